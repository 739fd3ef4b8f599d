"""What a p2pmodel node does, from a program that knows neither p2pmodel nor its protobuf: the node describes its calls.

    pip install grpcio grpcio-reflection
    python status.py unix:$HOME/.local/share/p2pmodel/control.sock
    python status.py node.example.org:7070 --tls DIR [--client NAME]

Any call works in this way: `python status.py ADDRESS --call Publish --request '{"record": "…"}'`.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

SERVICE = "p2pmodel.wire.v1.Control"


def open_channel(address: str, tls: Path | None, client: str) -> grpc.Channel:
    if tls is None:
        return grpc.insecure_channel(address)
    credentials = grpc.ssl_channel_credentials(
        root_certificates=(tls / "ca.pem").read_bytes(),
        private_key=(tls / f"{client}.key").read_bytes(),
        certificate_chain=(tls / f"{client}.pem").read_bytes(),
    )
    return grpc.secure_channel(address, credentials)


def call(channel: grpc.Channel, name: str, request: dict[str, Any]) -> dict[str, Any]:
    service = DescriptorPool(ProtoReflectionDescriptorDatabase(channel)).FindServiceByName(SERVICE)
    method = service.methods_by_name[name]
    takes, gives = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
    remote = channel.unary_unary(f"/{SERVICE}/{name}", takes.SerializeToString, gives.FromString)
    reply = remote(json_format.ParseDict(request, takes()), timeout=10)
    return json_format.MessageToDict(reply, preserving_proto_field_name=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Calls a p2pmodel node.")
    parser.add_argument("address")
    parser.add_argument("--tls", type=Path, help="folder of ca.pem, client.pem and client.key")
    parser.add_argument("--client", default="client", help="name of the client's files")
    parser.add_argument("--call", default="Status")
    parser.add_argument("--request", type=json.loads, default={}, help="as JSON")
    given = parser.parse_args()
    with open_channel(given.address, given.tls, given.client) as channel:
        try:
            print(json.dumps(call(channel, given.call, given.request), indent=2))
        except grpc.RpcError as error:
            # The node's own errors are one sentence; `p2pmodel-error-bin` in the trailing metadata has the rest.
            sys.exit(f"{error.code().name}: {error.details()}")


if __name__ == "__main__":
    main()
