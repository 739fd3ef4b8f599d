"""Options that several commands share, spelled once."""

from pathlib import Path
from typing import Annotated

import typer

Home = Annotated[
    Path | None,
    typer.Option(
        "--home",
        help="Folder of keys, patches and versions.",
        show_default="per user",
        envvar="P2PMODEL_HOME",
        file_okay=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print data instead of text.")]
Model = Annotated[
    str | None,
    typer.Option("--model", help="Name, id, folder of a checkpoint, or hub id.", show_default="the starter model"),
]
Base = Annotated[
    Path | None,
    typer.Option(
        "--base", help="Folder of the base checkpoint, when it is not found by itself.", exists=True, file_okay=False
    ),
]
Peers = Annotated[
    list[str] | None,
    typer.Option("--peers", help="Multiaddr of a node of the swarm (/ip4/…/tcp/…/p2p/…); may be repeated."),
]
Version = Annotated[str, typer.Option("--version", help="Number (1.0.2), id, `base` or `head`.")]
