"""`p2pmodel control`: certificates for the control API over TCP."""

from pathlib import Path
from typing import Annotated

import typer

from p2pmodel.cli import options
from p2pmodel.cli.output import emit
from p2pmodel.domain.errors import NotFound, UsageError

app = typer.Typer(no_args_is_help=True, help="Certificates for a node's control API over TCP.")

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the certificates.", file_okay=False)]
MAX_PEM_BYTES = 64 << 10


@app.command("certificates")
def certificates(
    folder: Folder,
    host: Annotated[
        list[str] | None,
        typer.Option("--host", help="Name or address that clients reach the node by; may be repeated."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Make an authority, a node's certificate and one client's, for `join --control-listen … --control-tls DIR`."""
    from p2pmodel.control.certificates import issue_client, issue_server, make_authority
    from p2pmodel.store.disk import make_folder, storage_errors
    from p2pmodel.store.secrets import write_secret

    if (folder / "ca.pem").exists():
        raise UsageError(
            f"{folder} has certificates already.", "Choose another folder, or add a client: p2pmodel control client"
        )
    authority = make_authority()
    server, client = issue_server(authority, host or ()), issue_client(authority, "client")
    with storage_errors(folder):
        make_folder(folder)
    for name, issued in (("server", server), ("client", client), ("ca", authority)):
        write_secret(folder / f"{name}.key", issued.key, replace=True)
        write_secret(folder / f"{name}.pem", issued.certificate, replace=True)
    emit(
        {"folder": str(folder)},
        f"{folder}: ca, server and client, each a .pem and a .key\n"
        f"node:   p2pmodel join --control-listen 0.0.0.0:7070 --control-tls {folder}\n"
        "client: ca.pem, client.pem and client.key; who has these may do everything. Keep ca.key away from the node.",
        json,
    )


@app.command("client")
def client(
    folder: Folder,
    name: Annotated[str, typer.Argument(help="Of the client, and of its files.")],
    json: options.Json = False,
) -> None:
    """Issue a certificate for one more client."""
    from p2pmodel.control.certificates import Issued, issue_client
    from p2pmodel.store.secrets import read_secret, write_secret

    if not name.replace("-", "").replace("_", "").isalnum() or name in ("ca", "server"):
        raise UsageError(f"{name[:64]!r} cannot be a client's name.", "Use letters, digits, - and _.")
    hint = "Make an authority: p2pmodel control certificates DIR"
    for path in (folder / f"{name}.key", folder / f"{name}.pem"):
        if path.exists():
            raise UsageError(f"{path} is there already.", "Choose another name.")
    if not folder.is_dir():
        raise NotFound(f"There is no folder {folder}.", hint)
    authority = Issued(
        read_secret(folder / "ca.pem", MAX_PEM_BYTES, "certificate", hint, secret=False),
        read_secret(folder / "ca.key", MAX_PEM_BYTES, "private key", hint),
    )
    issued = issue_client(authority, name)
    write_secret(folder / f"{name}.key", issued.key)
    write_secret(folder / f"{name}.pem", issued.certificate)
    emit({"certificate": f"{folder / name}.pem", "key": f"{folder / name}.key"}, f"{folder / name}.pem and .key", json)
