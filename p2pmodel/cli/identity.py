"""`p2pmodel id`: this home's key, and its moves from machine to machine."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from p2pmodel.cli import options
from p2pmodel.cli.output import emit
from p2pmodel.domain.errors import InvalidInput, NotFound, UsageError

app = typer.Typer(no_args_is_help=True, help="This home's key: show it, back it up, move it.")

PassphraseFile = Annotated[
    Path | None,
    typer.Option("--passphrase-file", help="Its first line is the passphrase; without it you are asked on a terminal."),
]
MAX_PASSPHRASE_BYTES = 4096


@app.command("show")
def show(home: options.Home = None, json: options.Json = False) -> None:
    """The peer id that this home signs with; it is made at the first use."""
    from p2pmodel.store.home import Home

    folder = Home.open(home)
    peer = folder.key.peer
    emit({"peer": peer, "key": str(folder.key_path)}, f"{peer}\nkey file: {folder.key_path}", json)


@app.command("export")
def export(
    file: Annotated[Path, typer.Argument(help="To be written; the key in it is encrypted.", dir_okay=False)],
    passphrase_file: PassphraseFile = None,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """Write this home's key to a file, under a passphrase."""
    from p2pmodel.store.home import Home
    from p2pmodel.store.secrets import write_secret
    from p2pmodel.wire import sealed_key

    folder = Home.open(home, create=False)
    if not folder.key_path.exists():
        raise NotFound(f"{folder.path} has no key yet.", "It is made at the first use: p2pmodel id show")
    if file.exists():
        raise UsageError(f"{file} is there already.", "Choose another name, or remove it first.")
    key = folder.key
    write_secret(file, sealed_key.seal(key, _passphrase(passphrase_file, confirm=True)))
    emit({"peer": key.peer, "file": str(file)}, f"{key.peer}\nexported to {file}", json)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="Made by `p2pmodel id export`.")],
    force: Annotated[
        bool, typer.Option("--force", help="Replace the key that this home has; the old one is kept beside it.")
    ] = False,
    passphrase_file: PassphraseFile = None,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """Take over an exported key: this home is that peer from now on. No node may run on it meanwhile."""
    from p2pmodel.store.home import Home
    from p2pmodel.wire import sealed_key

    try:
        with file.open("rb") as opened:
            sealed = sealed_key.read(opened.read(sealed_key.MAX_FILE_BYTES + 1), str(file))
    except FileNotFoundError:
        raise NotFound(f"There is no file {file}.") from None
    except OSError as error:
        raise InvalidInput(f"{file} cannot be read: {error.strerror}.") from None
    folder = Home.open(home)
    with folder.lock():
        folder.demand_place_for(sealed.peer, replace=force)
        key = sealed_key.unseal(sealed, _passphrase(passphrase_file, confirm=False), str(file))
        kept = folder.take_key(key, replace=force)
    text = f"{key.peer}\nis this home's key now: {folder.key_path}" + (f"\nthe old one: {kept}" if kept else "")
    emit({"peer": key.peer, "key": str(folder.key_path), "replaced": kept and str(kept)}, text, json)


def _passphrase(file: Path | None, *, confirm: bool) -> str:
    """Raises UsageError, NotFound, InvalidInput."""
    if file is None:
        if not sys.stdin.isatty():
            raise UsageError("Nobody can be asked for the passphrase here.", "Name a file with --passphrase-file.")
        asked: str = typer.prompt("Passphrase", hide_input=True, confirmation_prompt=confirm, err=True)
        return asked
    from p2pmodel.store.secrets import read_secret

    raw = read_secret(file, MAX_PASSPHRASE_BYTES, "passphrase file", "Name another with --passphrase-file.")
    try:
        text = raw.decode().splitlines()[0].strip("\r\n")
    except (UnicodeDecodeError, IndexError):
        text = ""
    if not text or len(raw) > MAX_PASSPHRASE_BYTES:
        raise InvalidInput(f"The first line of {file} is no passphrase.")
    return text
