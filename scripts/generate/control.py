"""docs/control-api.md, from the comments of proto/p2pmodel/wire/v1/control.proto.

Every service, call, message and field has to have a comment: one without is an error.
"""

import tempfile
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet
from grpc_tools import protoc

from scripts.generate import ROOT

PROTO = "p2pmodel/wire/v1/control.proto"

_MESSAGE, _ENUM, _SERVICE, _SYNTAX = 4, 5, 6, 12
_FIELD, _METHOD = 2, 2
Comments = Mapping[tuple[int, ...], str]

INTRODUCTION = """\
# The control API

Made from `proto/p2pmodel/wire/v1/control.proto` by `scripts/proto`: change the comments there.

{about}

## Calling it

From any language with gRPC. The server has reflection and the standard health service (`grpc.health.v1.Health`), so a
client needs no generated code: [examples/control/status.py](examples/control/status.py) is one in 60 lines that knows
neither p2pmodel nor its protobuf.

```
grpcurl -plaintext -unix ~/.local/share/p2pmodel/control.sock {service}/Status
```

From other machines it is served with certificates on both sides only; there is no way to serve it over TCP without:

```
p2pmodel control certificates DIR --host node.example.org     # an authority, the node's certificate, a client's
p2pmodel join --control-listen 0.0.0.0:7070 --control-tls DIR
grpcurl -cacert DIR/ca.pem -cert DIR/client.pem -key DIR/client.key node.example.org:7070 {service}/Status
p2pmodel control client DIR NAME                              # one more client
```

The node needs `ca.pem`, `server.pem` and `server.key`; keep `ca.key` elsewhere. Whoever has a client's key may do all
that the API does. To take that back, make new certificates.
"""


def files() -> dict[str, str]:
    return {"docs/control-api.md": page()}


def page() -> str:
    file = _described()
    comments = {
        tuple(at.path): " ".join(line.strip() for line in at.leading_comments.strip().splitlines())
        for at in file.source_code_info.location
        if at.leading_comments.strip()
    }
    service = file.service[0]
    name = f"{file.package}.{service.name}"
    about = next(at for at in file.source_code_info.location if tuple(at.path) == (_SYNTAX,)).leading_comments
    paragraphs = [" ".join(part.split()) for part in about.strip().split("\n\n")]
    parts = [INTRODUCTION.format(about="\n\n".join(paragraphs), service=name), f"## `{name}`\n"]
    rows = []
    for index, method in enumerate(service.method):
        takes, gives = (_link(kind.rpartition(".")[2]) for kind in (method.input_type, method.output_type))
        stream = "a stream of " if method.server_streaming else ""
        what = _comment(comments, (_SERVICE, 0, _METHOD, index), method.name)
        rows.append(f"| `{method.name}` | {takes} | {stream}{gives} | {what} |")
    parts.append("| Call | Takes | Gives | |\n|---|---|---|---|\n" + "\n".join(rows) + "\n")
    parts.append("## Messages\n")
    parts += [_message(message, (_MESSAGE, index), comments) for index, message in enumerate(file.message_type)]
    return "\n".join(parts)


def _described() -> FileDescriptorProto:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "set"
        includes = [f"-I{ROOT / 'proto'}", f"-I{resources.files('grpc_tools') / '_proto'}"]
        arguments = ["protoc", *includes, "--include_source_info", f"--descriptor_set_out={target}", PROTO]
        if protoc.main(arguments):
            raise SystemExit(f"{PROTO} cannot be compiled")
        return FileDescriptorSet.FromString(target.read_bytes()).file[0]


def _message(message: DescriptorProto, path: tuple[int, ...], comments: Comments) -> str:
    lines = [f"### {message.name}\n"]
    if path in comments:
        lines.append(comments[path] + "\n")
    if not message.field:
        return "\n".join([*lines, "Empty.\n"])
    lines.append("| Field | Type | |\n|---|---|---|")
    maps = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
    for index, field in enumerate(message.field):
        what = _comment(comments, (*path, _FIELD, index), f"{message.name}.{field.name}")
        lines.append(f"| `{field.name}` | {_type(field, maps)} | {what} |")
    return "\n".join(lines) + "\n"


def _type(field: FieldDescriptorProto, maps: Mapping[str, DescriptorProto]) -> str:
    short = field.type_name.rpartition(".")[2]
    if short in maps:
        key, value = maps[short].field
        return f"map of {_type(key, {})} to {_type(value, {})}"
    name = _link(short) if short else FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    return f"list of {name}" if field.label == FieldDescriptorProto.LABEL_REPEATED else name


def _link(message: str) -> str:
    return f"[{message}](#{message.lower()})"


def _comment(comments: Comments, path: tuple[int, ...], what: str) -> str:
    if path not in comments:
        raise SystemExit(f"{what} has no comment in {PROTO}")
    return comments[path].replace("|", "\\|")
