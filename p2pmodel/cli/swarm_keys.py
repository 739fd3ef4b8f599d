"""`p2pmodel swarm-key`: the key of a private swarm."""

from pathlib import Path
from typing import Annotated

import typer

from p2pmodel.cli import options
from p2pmodel.cli.output import emit
from p2pmodel.domain.errors import NotFound

app = typer.Typer(no_args_is_help=True, help="The key of a private swarm: make one, compare two.")


@app.command("new")
def new(
    file: Annotated[Path, typer.Argument(help="To be written, for you alone to read.", dir_okay=False)],
    json: options.Json = False,
) -> None:
    """Make a key. Who has a copy of the file is a member: give it to members alone, by a safe way."""
    from p2pmodel.store.secrets import write_secret
    from p2pmodel.wire.swarm_key import SwarmKey

    key = SwarmKey.generate()
    write_secret(file, key.to_text())
    emit(
        {"file": str(file), "fingerprint": key.fingerprint},
        f"{file}, fingerprint {key.fingerprint}\nUse it with: p2pmodel join --swarm-key {file}",
        json,
    )


@app.command("show")
def show(swarm_key: options.SwarmKey = None, home: options.Home = None, json: options.Json = False) -> None:
    """The fingerprint of the key in use: the same for all members."""
    from p2pmodel.store.home import Home

    key = Home.open(home).swarm_key(swarm_key)
    if key is None:
        raise NotFound("No swarm key is in use here.", "Name one with --swarm-key, or in config.toml: swarm_key = FILE")
    emit({"fingerprint": key.fingerprint}, key.fingerprint, json)
