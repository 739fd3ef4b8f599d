"""`p2pmodel sim`."""

import shlex
import time
from typing import TYPE_CHECKING, Annotated

import typer

from p2pmodel.cli import options
from p2pmodel.cli.output import emit, plain, table
from p2pmodel.domain.errors import UsageError

if TYPE_CHECKING:
    from p2pmodel.sim.record import Outcome
    from p2pmodel.sim.scenario import Scenario

MAX_SEEDS = 1_000_000
SHOWN = 10


def sim(
    scenario: Annotated[
        str | None,
        typer.Argument(help="A TOML file, or the name of a scenario that `--list` prints.", show_default=False),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="The first seed; the same one gives the same history.")
    ] = 0,
    seeds: Annotated[int, typer.Option("--seeds", min=1, max=MAX_SEEDS, help="How many histories.")] = 1,
    nodes: Annotated[int | None, typer.Option("--nodes", min=2, help="Instead of the scenario's.")] = None,
    hours: Annotated[float | None, typer.Option("--hours", help="Of virtual time, instead of the scenario's.")] = None,
    show: Annotated[bool, typer.Option("--list", help="Print the scenarios that come with p2pmodel.")] = False,
    json: options.Json = False,
) -> None:
    """Run thousands of nodes in virtual time, and check what has to hold. Status 1 when something does not."""
    from p2pmodel.sim.scenario import bundled, load

    if show:
        known = bundled()
        rows = [(name, str(x.swarm.nodes), f"{x.hours:g} h", x.about) for name, x in known.items()]
        return emit(known, table("", ("scenario", "nodes", "time", "what happens"), rows), json)
    if scenario is None:
        raise UsageError("Name a scenario.", "See: p2pmodel sim --list")
    plan = load(scenario).changed(nodes, hours)
    began = time.monotonic()
    outcomes = _simulate(plan, range(seed, seed + seeds))
    failed = [outcome for outcome in outcomes if outcome.violations]
    replays = {outcome.seed: _replay(scenario, outcome.seed, nodes, hours) for outcome in failed}
    seconds = time.monotonic() - began
    if json:
        runs = [plain(outcome) | {"replay": replays.get(outcome.seed, "")} for outcome in outcomes]
        emit({"scenario": plan.name, "seconds": seconds, "failed": sorted(replays), "runs": runs}, "", json)
    else:
        typer.echo(_text(plan, outcomes, seconds))
        for outcome in failed[:SHOWN]:
            typer.echo(f"\nseed {outcome.seed} broke what has to hold:")
            for violation in outcome.violations[:SHOWN]:
                typer.echo(f"  {violation}")
            typer.echo(f"  again: {replays[outcome.seed]}")
        if len(failed) > SHOWN:
            typer.echo(f"\nand {len(failed) - SHOWN} more: {', '.join(str(x.seed) for x in failed[SHOWN:])}")
    if failed:
        raise typer.Exit(1)


def _simulate(plan: "Scenario", seeds: range) -> "list[Outcome]":
    """One after the other, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from p2pmodel.sim.judge import simulate

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
    )
    outcomes: list[Outcome] = []
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(plan.name, total=len(seeds))
        for done, seed in enumerate(seeds):
            outcomes.append(simulate(plan, seed, lambda share, done=done: bar.update(task, completed=done + share)))  # type: ignore[misc]
            broken = sum(bool(outcome.violations) for outcome in outcomes)
            bar.update(task, description=f"{plan.name}, {broken} of {done + 1} failed" if broken else plan.name)
    return outcomes


def _replay(scenario: str, seed: int, nodes: int | None, hours: float | None) -> str:
    changed = (("--nodes", nodes), ("--hours", hours))
    words = [
        "p2pmodel",
        "sim",
        scenario,
        "--seed",
        str(seed),
        *(w for k, v in changed if v is not None for w in (k, f"{v:g}")),
    ]
    return shlex.join(words)


def _text(plan: "Scenario", outcomes: "list[Outcome]", seconds: float) -> str:
    """Figures of one history, or of the worst among several."""
    worst = max(outcomes, key=lambda outcome: outcome.reach_seconds.all)
    reach, sent = worst.reach_seconds, worst.messages_per_minute
    failed = sum(bool(outcome.violations) for outcome in outcomes)
    rows = [
        ("scenario", f"{plan.name}: {plan.about}"),
        ("nodes", f"{worst.nodes} for {worst.hours:g} h of virtual time; {worst.went} went, {worst.came} came"),
        (
            "versions",
            f"{worst.versions}, to {worst.head}; rounds rejected {worst.rejected}, abandoned {worst.abandoned}",
        ),
        (
            "honest patches",
            f"{worst.merged} merged, {worst.left_out} left out, {worst.late} late, {worst.waiting} waiting",
        ),
        ("to reach a version", f"{reach.half:.1f} s half of the nodes, {reach.most:.1f} s 99 %, {reach.all:.1f} s all"),
        (
            "messages a minute",
            f"{sent.half:.0f} of half of the nodes, {sent.most:.0f} of 99 %, {sent.all:.0f} of the busiest",
        ),
        (
            "transfers",
            f"{worst.transfers}; {worst.turned_away} turned away by a busy peer; longest backlog {worst.backlog}",
        ),
        ("refused", f"{worst.refused} records; maintainers seen to sign twice {worst.misbehaved}"),
    ]
    if plan.hosting:
        rows.append(("hosting", f"{worst.moves} moves, longest gap of a layer {worst.longest_gap:.0f} s"))
    events = sum(outcome.happened for outcome in outcomes)
    rows.append(("simulated", f"{events} events in {seconds:.1f} s"))
    title = (
        f"{len(outcomes) - failed} of {len(outcomes)} seeds kept all promises; the slowest:"
        if len(outcomes) > 1
        else ""
    )
    return "\n".join([*([title] if title else []), *(f"{name:<20}{value}" for name, value in rows)])
