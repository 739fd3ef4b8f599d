"""`p2pmodel`: the map of the product. Each command lives in a module named after what it is about."""

import atexit
import contextlib
import faulthandler
import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from p2pmodel import __version__
from p2pmodel.cli import (
    amending,
    branching,
    certificates,
    experts,
    garbage,
    identity,
    inspecting,
    joining,
    merging,
    modelling,
    monitoring,
    patching,
    prompting,
    quickstart,
    rebasing,
    rounds,
    serving,
    simulating,
    swarm_keys,
    testing,
    training,
    versioning,
)
from p2pmodel.cli.options import Home
from p2pmodel.domain.errors import NotFound, P2PModelError

app = typer.Typer(
    name="p2pmodel",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"auto_envvar_prefix": "P2PMODEL", "help_option_names": ["-h", "--help"]},
    help="Host, use, train and improve a model together, from machine to machine.",
)

START, USE, IMPROVE, LOOK = "Start here", "Use a model", "Improve a model", "Look"

app.command(rich_help_panel=START)(quickstart.quickstart)
app.command(rich_help_panel=START)(inspecting.doctor)
app.command(rich_help_panel=USE)(joining.join)
app.command(rich_help_panel=USE)(prompting.infer)
app.command(rich_help_panel=USE)(serving.serve)
app.command(rich_help_panel=IMPROVE)(training.train)
app.add_typer(patching.app, name="patch", rich_help_panel=IMPROVE)
app.command(rich_help_panel=IMPROVE)(merging.merge)
modelling.app.command()(amending.amend)
app.command(rich_help_panel=IMPROVE)(rebasing.rebase)
app.command(rich_help_panel=IMPROVE)(branching.branch)
app.command(rich_help_panel=IMPROVE)(branching.merge_branches)
app.add_typer(experts.app, name="expert", rich_help_panel=IMPROVE)
app.add_typer(modelling.app, name="model", rich_help_panel=IMPROVE)
app.add_typer(rounds.app, name="round", rich_help_panel=IMPROVE)
app.command("eval", rich_help_panel=IMPROVE)(prompting.evaluate)
app.command("test", rich_help_panel=IMPROVE)(testing.examine)
app.add_typer(testing.exam, name="exam", rich_help_panel=IMPROVE)
app.command(rich_help_panel=IMPROVE)(versioning.rollback)
app.command(rich_help_panel=LOOK)(inspecting.status)
app.command(rich_help_panel=LOOK)(inspecting.log)
app.command(rich_help_panel=LOOK)(versioning.show)
app.command(rich_help_panel=LOOK)(versioning.diff)
app.command(rich_help_panel=LOOK)(versioning.checkout)
app.command(rich_help_panel=LOOK)(versioning.deps)
app.command(rich_help_panel=LOOK)(versioning.tag)
app.add_typer(versioning.app, name="version", rich_help_panel=LOOK)
app.add_typer(monitoring.app, name="monitor", rich_help_panel=LOOK)
app.add_typer(identity.app, name="id", rich_help_panel=LOOK)
app.add_typer(certificates.app, name="control", rich_help_panel=LOOK)
app.add_typer(swarm_keys.app, name="swarm-key", rich_help_panel=USE)
app.command(rich_help_panel=LOOK)(inspecting.fsck)
app.command(rich_help_panel=LOOK)(garbage.gc)
app.command(rich_help_panel=LOOK)(simulating.sim)


def _print_version(wanted: bool) -> None:
    """As a callback of the option it works without a command."""
    if wanted:
        typer.echo(f"p2pmodel {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    home: Home = None,
    log_level: str = typer.Option("WARNING", "--log-level", help="DEBUG, INFO, WARNING or ERROR.", show_default=True),
    log_format: str = typer.Option("text", "--log-format", help="Of logs on stderr: text, or json, an object a line."),
    version: bool = typer.Option(
        False, "--version", help="Print the version and leave.", is_eager=True, callback=_print_version
    ),
) -> None:
    if context.resilient_parsing or "--help" in sys.argv or "-h" in sys.argv:
        return
    from p2pmodel.store.home import Home as HomeFolder
    from p2pmodel.telemetry.logs import configure

    configure(log_level, form=log_format)
    if home is not None:
        os.environ["P2PMODEL_HOME"] = str(home)
    with contextlib.suppress(NotFound):
        context.default_map = HomeFolder.open(named_home(sys.argv) or home, create=False).settings()


def named_home(words: Sequence[str]) -> Path | None:
    """What the last `--home` names. It may stand behind the command, whose options are read only after config.toml,
    which is in there, has given their defaults."""
    found = None
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "--":
            break
        if word == "--home" and following:
            found = Path(following)
        elif word.startswith("--home="):
            found = Path(word.removeprefix("--home="))
    return found


def main() -> None:
    """Entry point: errors of users, peers and machines end in one sentence and a status (docs/exit-codes.md)."""
    faulthandler.enable(2)  # a crash of native code says on stderr where it was
    atexit.register(gc.freeze)  # or the interpreter searches all of torch for garbage, for seconds, before it ends
    try:
        app()
    except P2PModelError as error:
        from p2pmodel.telemetry.logs import report

        if not report(error):
            typer.echo(f"p2pmodel: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
