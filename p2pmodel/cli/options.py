"""Options that several commands share, spelled once."""

import re
from pathlib import Path
from typing import Annotated

import typer

from p2pmodel.domain.errors import UsageError

PATCH_SUFFIX = ".p2patch"
UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}

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
SwarmKey = Annotated[
    Path | None,
    typer.Option(
        "--swarm-key",
        metavar="FILE",
        help="Key of a private swarm: without it nobody can join, list or call its peers.",
        show_default="config.toml's, or anybody may join",
        envvar="P2PMODEL_SWARM_KEY",
    ),
]
Version = Annotated[str, typer.Option("--version", help="Number (1.0.2), id, `base` or `head`.")]
VersionArgument = Annotated[str, typer.Argument(metavar="VERSION", help="Number (1.0.2), tag, id, `base` or `head`.")]
PatchArgument = Annotated[str, typer.Argument(metavar="PATCH", help="A patch file, or the id of a known patch.")]


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of `9100`, `0.0.0.0:9100` or `[::]:9100`; the host is 127.0.0.1 where none is named. Raises
    UsageError."""
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"{text[:64]!r} is no address to listen on.", "Write it as 9100, or 0.0.0.0:9100.")
    return host.removeprefix("[").removesuffix("]") or "127.0.0.1", int(port)


def versioned(name: str) -> str:
    """The name of a patch kind or a merge strategy, whose version may be left out where it is the first."""
    return name if "@" in name else f"{name}@1"


def parse_size(text: str) -> int:
    """Bytes of `2GiB`, `500MB` or a plain number. Raises UsageError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?i?)B?", text.strip().replace("K", "k"))
    unit = found and {"ki": "Ki"}.get(found[2], found[2])
    if not found or unit not in UNITS or not (size := int(float(found[1]) * UNITS[unit])):
        raise UsageError(f"{text[:32]!r} is no size in bytes.", "Write it as 2GiB, 500MB, or a number of bytes.")
    return size
