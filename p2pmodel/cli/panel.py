"""What `p2pmodel join` shows on a terminal: lines as they come, and below them a panel of what the node does."""

import sys
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Self

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from p2pmodel.cli.output import counted, duration, printable
from p2pmodel.domain.ids import short
from p2pmodel.telemetry import logs

if TYPE_CHECKING:
    from p2pmodel.node.watching.glance import Glance

NARROW = 100
"""Columns below which patches and versions are not beside but below each other."""
MOST_LAYERS_DRAWN = 64


class LivePanel:
    """For a `with` statement. The panel appears with the first `show`, and is gone at the end; lines stay."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._stack = ExitStack()
        self._live: Live | None = None

    @staticmethod
    def has_place() -> bool:
        """Whether stdout is a terminal that can draw, and nothing that is meant for programs goes there as well."""
        console = Console()
        together = sys.stderr.isatty() and logs.for_programs()
        return console.is_terminal and not console.is_dumb_terminal and not together

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live = None
        self._stack.close()

    def say(self, line: str) -> None:
        if self._live is None:
            typer.echo(line)
        else:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def show(self, glance: "Glance") -> None:
        if self._live is None:
            self._stack.enter_context(logs.above(self._console))
            self._live = self._stack.enter_context(Live(console=self._console, auto_refresh=False, transient=True))
        self._live.update(view(glance, self._console.width), refresh=True)


def view(glance: "Glance", width: int) -> RenderableType:
    """The panel. What peers say of themselves is shown without the characters that steer a terminal."""
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(overflow="fold")
    rows.add_row("hosting", _hosting(glance))
    if glance.hosted:
        rows.add_row("serving", _serving(glance))
    rows.add_row("swarm", _swarm(glance))
    rows.add_row(f"round {glance.round}", _round(glance))
    rows.add_row("peers", _peers(glance))
    lists = (_patches(glance), _versions(glance))
    below: RenderableType = Group(lists[0], Text(), lists[1])
    if width >= NARROW:
        beside = Table.grid(padding=(0, 4), expand=True)
        beside.add_column(ratio=1)
        beside.add_column(ratio=1)
        beside.add_row(*lists)
        below = beside
    panel = Panel(
        Group(rows, Text(), below),
        title=Text(f"{printable(glance.model)} {glance.head}", "bold"),
        title_align="left",
        subtitle=Text(f"peer …{glance.peer[-8:]}, up {duration(glance.uptime)}; Ctrl-C leaves", "dim"),
        subtitle_align="right",
        border_style="dim",
    )
    # Outside of the panel, so that it can be copied though it is folded.
    join = Text(f"join with: p2pmodel join --peers {glance.address}", "dim", overflow="fold")
    return Group(panel, join) if glance.address else panel


def _hosting(glance: "Glance") -> Text:
    lease, layers = glance.hosted, len(glance.coverage)
    if lease is None:
        return Text(f"{glance.part}; records, patches and rounds")
    row = "".join("█" if layer in lease.span else "·" for layer in range(layers)) if layers <= MOST_LAYERS_DRAWN else ""
    moving = f", moving to {lease.moving}" if lease.moving else ""
    return Text.assemble(
        f"layers {lease.span} of {layers} in {lease.dtype}{moving}  ",
        (row, "cyan"),
        f"  {lease.layer_seconds * 1e3:.2f} ms a layer",
    )


def _serving(glance: "Glance") -> Text:
    text = Text.assemble(
        (counted(glance.sessions, "session"), "bold" if glance.sessions else ""),
        f" now, {glance.sessions_total} in all; {counted(glance.tokens, 'token')}, ",
        f"{glance.tokens_per_second:.1f} a second",
    )
    return text.append(f"; {glance.failed} failed", "red") if glance.failed else text


def _swarm(glance: "Glance") -> Text:
    missing = sum(1 for hosts in glance.coverage if not hosts)
    nobody = f"{counted(missing, 'layer')} {'is' if missing == 1 else 'are'} served by nobody  "
    state = (nobody, "bold red") if missing else ("every layer is served  ", "green")
    if len(glance.coverage) > MOST_LAYERS_DRAWN:
        return Text.assemble(state)
    hosts = [("✗", "bold red") if not count else (str(min(count, 9)), "green") for count in glance.coverage]
    return Text.assemble(state, *hosts, ("  hosts of each", "dim"))


def _round(glance: "Glance") -> Text:
    return Text(
        f"{glance.phase} for {duration(glance.phase_seconds)}: {counted(glance.round_patches, 'patch')}, "
        f"{glance.accepts} of {glance.threshold} accepting verdicts"
    )


def _peers(glance: "Glance") -> Text:
    if not glance.peers:
        return Text("nobody else yet", "dim")
    names = [
        f"…{peer.peer[-8:]} {peer.span + ' ' if peer.span else ''}({printable(', '.join(peer.roles))})"
        for peer in glance.peers
    ]
    more = glance.peer_count - len(glance.peers)
    return Text(f"{glance.peer_count}: {', '.join(names)}" + (f" and {more} more" if more else ""))


def _patches(glance: "Glance") -> RenderableType:
    if not glance.patches:
        return Text("no patches of mine yet", "dim")
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="cyan")
    grid.add_column(overflow="fold")
    grid.add_row(Text("my patches", "dim"), Text(f"{glance.patch_count} in all", "dim"))
    for patch in glance.patches:
        said = Text(printable(patch.state), _colour(patch.state))
        if patch.accepts or patch.rejects:
            said.append(f", {patch.accepts} accept, {patch.rejects} reject", "bold")
        grid.add_row(short(patch.id), said)
    return grid


def _colour(state: str) -> str:
    return {"merged": "green", "left": "yellow", "missed": "yellow"}.get(state.partition(" ")[0], "")


def _versions(glance: "Glance") -> RenderableType:
    if not glance.versions:
        return Text("no version after the base yet", "dim")
    grid = Table.grid(padding=(0, 2))
    for style in ("bold", "cyan", "", "", ""):
        grid.add_column(no_wrap=True, style=style)
    grid.add_row(*(Text(text, "dim") for text in ("versions", "", "", "exam", "vs parent")))
    for version in glance.versions:
        loss = "-" if version.loss is None else f"{version.loss:.4f}"
        change = f"{version.loss / version.before - 1:+.2%}" if version.loss is not None and version.before else "-"
        grid.add_row(version.number, short(version.id), version.what, loss, change)
    return grid
