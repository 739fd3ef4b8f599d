"""`p2pmodel status --watch`: the node's status in a terminal, as it changes."""

import time
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from p2pmodel.cli.output import duration, printable
from p2pmodel.cli.status_text import round_line
from p2pmodel.control.client import ControlClient
from p2pmodel.domain.errors import P2PModelError, UsageError
from p2pmodel.domain.experts import describe
from p2pmodel.domain.ids import short
from p2pmodel.store.home import Home
from p2pmodel.wire.v1 import control_pb2 as pb

EVERY_SECONDS = 1.0


def watch(home: Path | None) -> None:
    """Until Ctrl-C. Raises NotRunning when there is no node to begin with, UsageError where there is no terminal."""
    console = Console()
    if not console.is_terminal:
        raise UsageError("--watch needs a terminal.", "Leave it out, or ask for --json.")
    socket = Home.open(home).control_socket
    with ControlClient.connect(socket) as client:
        shown = view(client.status())
    try:
        with Live(shown, console=console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(EVERY_SECONDS)
                live.update(_look(socket), refresh=True)
    except KeyboardInterrupt:
        pass  # the terminal is as it was before


def _look(socket: Path) -> RenderableType:
    try:
        with ControlClient.connect(socket) as client:
            return view(client.status())
    except P2PModelError as error:
        return Text(f"{error.message} It is asked again every second; Ctrl-C ends this.", style="yellow")


def view(reply: pb.StatusReply) -> RenderableType:
    """The whole screen. What peers say of themselves is shown without the characters that steer a terminal."""
    head = Text.assemble(("p2pmodel ", "bold"), f"peer …{reply.peer[-8:]}, up {duration(reply.uptime_seconds)}")
    join = [Text(f"join with: p2pmodel join --peers {address}", "dim", overflow="fold") for address in reply.addresses]
    blocks: list[RenderableType] = [head, *join[:1]]
    for model in reply.models:
        blocks += [Text(""), *_model(reply, model)]
    return Group(*blocks, Text(""), Text("Ctrl-C ends this", style="dim"))


def _model(reply: pb.StatusReply, model: pb.ModelStatus) -> list[RenderableType]:
    covered = sum(1 for hosts in model.coverage if hosts)
    whole = covered == model.layers
    experts: list[RenderableType] = [Text(""), _experts(reply, model)] if model.expert_leases else []
    return [
        Text.assemble(
            (f"{printable(model.name)} {model.head.number}", "bold"),
            f" ({short(model.id)})  ",
            (f"{'✓' if whole else '✗'} {covered} of {model.layers} layers served", "green" if whole else "bold red"),
            f"  {model.sessions} sessions here",
        ),
        Text(round_line(model.round)),
        Text.assemble("hosts of each layer  ", *(_host_count(hosts) for hosts in model.coverage)),
        Text(""),
        _leases(reply, model),
        *experts,
        Text(""),
        _peers(model),
    ]


def _host_count(hosts: int) -> tuple[str, str]:
    return (str(min(hosts, 9)), "green") if hosts else ("✗", "bold red")


def _leases(reply: pb.StatusReply, model: pb.ModelStatus) -> Table:
    grid = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("layers", "", "host", "versions", "dtype"):
        grid.add_column(name, no_wrap=True)
    for name in ("ms a layer", "sessions"):
        grid.add_column(name, justify="right", no_wrap=True)
    for lease in model.leases:
        row = "".join("█" if lease.span.start <= n < lease.span.end else "·" for n in range(model.layers))
        grid.add_row(
            f"{lease.span.start}:{lease.span.end}",
            Text(row if model.layers <= 64 else "", "cyan"),
            f"…{lease.peer[-8:]}{'  this node' if lease.peer == reply.peer else ''}",
            ", ".join(version.number or short(version.id) for version in lease.versions),
            Text(printable(lease.dtype)),
            f"{lease.layer_seconds * 1e3:.2f}",
            str(lease.queue),
        )
    return grid


def _experts(reply: pb.StatusReply, model: pb.ModelStatus) -> Table:
    grid = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("experts", "of layers", "host", "versions", "dtype"):
        grid.add_column(name, no_wrap=True)
    for name in ("ms a row", "rows a second"):
        grid.add_column(name, justify="right", no_wrap=True)
    for lease in model.expert_leases:
        moving = f" (-{describe(lease.going)} +{describe(lease.coming)})" if lease.coming else ""
        grid.add_row(
            f"{describe(lease.experts)}{moving}",
            f"{lease.span.start}:{lease.span.end}",
            f"…{lease.peer[-8:]}{'  this node' if lease.peer == reply.peer else ''}",
            ", ".join(version.number or short(version.id) for version in lease.versions),
            Text(printable(lease.dtype)),
            f"{lease.pair_seconds * 1e3:.2f}",
            f"{sum(lease.rows_per_second):.1f}" if lease.rows_per_second else "",
        )
    return grid


def _peers(model: pb.ModelStatus) -> Text:
    names = ", ".join(f"…{p.peer[-8:]} ({printable(', '.join(p.roles))})" for p in model.presences)
    return Text(f"{len(model.presences)} peers: {names}")
