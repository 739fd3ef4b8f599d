"""`p2pmodel round`."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from p2pmodel.cli import options
from p2pmodel.cli.lineages import lineage_of
from p2pmodel.cli.output import emit, printable
from p2pmodel.cli.versioning import score_table
from p2pmodel.domain.errors import P2PModelError
from p2pmodel.domain.ids import PatchId, short

if TYPE_CHECKING:
    from p2pmodel.node.lineages.lineage import Lineage
    from p2pmodel.node.rounds.roundview import CandidateView, RoundView
    from p2pmodel.wire.v1.control_pb2 import RoundStatus

app = typer.Typer(no_args_is_help=True, help="Look at the round on the head, and decide as a maintainer.")

POLL_SECONDS = 1.0
SHOWN_PATCHES = 24
"""Of those that wait."""

CandidateText = Annotated[str, typer.Argument(metavar="CANDIDATE", help="Id of a candidate, or the beginning of it.")]


@app.command()
def show(model: options.Model = None, home: options.Home = None, json: options.Json = False) -> None:
    """Patches and candidates on the head, who said what of them, and who signed twice."""
    from p2pmodel.cli.status_text import round_line
    from p2pmodel.node.rounds.roundview import look

    lineage = lineage_of(home, model)
    view, now = look(lineage), _of_node(lineage)
    text = _text(view, round_line(now).removeprefix("round ") if now else "")
    emit({**vars(view), "phase": _phase(now), "examined": now.examined if now else 0}, text, json)


@app.command()
def watch(model: options.Model = None, home: options.Home = None, json: options.Json = False) -> None:
    """Show the round again whenever it changes, until Ctrl-C."""
    from p2pmodel.node.rounds.roundview import look

    lineage, last = lineage_of(home, model), ""
    while True:
        lineage.refresh()
        view, phase = look(lineage), _phase(_of_node(lineage))
        if (text := _text(view, phase)) != last:
            emit({**vars(view), "phase": phase}, text + "\n", json)
            last = text
        time.sleep(POLL_SECONDS)


@app.command()
def approve(
    candidate: CandidateText, model: options.Model = None, home: options.Home = None, json: options.Json = False
) -> None:
    """Let this home's maintainer accept a candidate: what `join --ask` waits for, and every amendment."""
    _decide(candidate, model, home, json, True, "")


@app.command()
def reject(
    candidate: CandidateText,
    reason: Annotated[str, typer.Option("--reason", help="What everybody will read.")],
    model: options.Model = None,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """Let this home's maintainer reject a candidate that waits for its word."""
    _decide(candidate, model, home, json, False, reason)


@app.command()
def weigh(
    weights: Annotated[list[str], typer.Argument(metavar="PATCH=λ…", help="Ids of patches; 0 leaves one out.")],
    model: options.Model = None,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """Say how much patches count in candidates that this home's maintainer proposes; 1 is what all begin with."""
    from p2pmodel.cli.merging import parse_weights

    lineage = lineage_of(home, model)
    given = {lineage.find_patch(text): weight for text, weight in parse_weights(weights).items()}
    for patch, weight in given.items():
        lineage.notes.weigh(patch, weight)
    emit(
        {"weights": given},
        "\n".join(f"patch {short(patch)} counts {weight:g}" for patch, weight in given.items()),
        json,
    )


def _decide(text: str, model: str | None, home: options.Home, json: bool, accept: bool, reason: str) -> None:
    from p2pmodel.control.client import ControlClient
    from p2pmodel.node.rounds.deciding import decide, find_candidate

    lineage = lineage_of(home, model)
    version = find_candidate(lineage, text)
    with ControlClient.connect(lineage.home.control_socket) as client:
        record = decide(lineage, version, accept, reason)
        if record is not None:
            client.publish(record)
    word = "approved" if accept else "rejected"
    emit({"id": version, "decision": word}, f"version {short(version)} is {word} by this home", json)


def _phase(now: "RoundStatus | None") -> str:
    return f"round {now.number}, {now.phase}" if now else ""


def _of_node(lineage: "Lineage") -> "RoundStatus | None":
    """The round as the node of this home sees it; None when none runs."""
    from p2pmodel.control.client import ControlClient

    try:
        with ControlClient.connect(lineage.home.control_socket) as client:
            models = [model for model in client.status().models if model.id == lineage.model]
    except P2PModelError:
        return None
    return models[0].round if models else None


def _text(view: "RoundView", phase: str) -> str:
    lines = [
        f"head         {view.name} {view.number} ({short(view.head)})",
        f"round        {phase or 'no node runs on this home; what follows is in its store'}",
        f"decide       {view.threshold} of {len(view.maintainers)} maintainers"
        + (", of which this home is one" if view.maintains else ""),
        f"patches      {_some(view.patches)}",
    ]
    for candidate in view.candidates:
        lines += ["", *_candidate_lines(candidate)]
    for liar in view.double_signers:
        versions = " and ".join(short(version) for version in liar.versions)
        lines += [
            "",
            f"SIGNED TWICE {liar.maintainer} in round {liar.round}: {versions}",
            f"proof        verdicts {', '.join(short(digest) for digest in liar.verdicts)}",
        ]
    lines += [f"\nFORK         {', '.join(short(version) for version in siblings)}" for siblings in view.forks]
    return "\n".join(lines)


def _some(patches: Sequence[PatchId]) -> str:
    more = f" and {len(patches) - SHOWN_PATCHES} more: p2pmodel patch list" if len(patches) > SHOWN_PATCHES else ""
    return (", ".join(short(patch) for patch in patches[:SHOWN_PATCHES]) or "none") + more


def _candidate_lines(candidate: "CandidateView") -> list[str]:
    lines = [
        f"candidate    {short(candidate.version)} of round {candidate.round}, by {candidate.proposer}",
        f"             {candidate.what}",
    ]
    lines += [f"  merges     {short(patch)}  {contributor or 'not here'}" for patch, contributor in candidate.patches]
    lines += [f"  left out   {short(entry.patch)}  {printable(entry.reason)}" for entry in candidate.left_out]
    for electorate in candidate.electorates[1:]:
        lines.append(f"needs        {electorate.threshold} of these as well")
        lines += [f"             {peer}" for peer in electorate.maintainers]
    lines += [f"  accepts    {peer}" for peer in candidate.accepts]
    lines += [f"  rejects    {peer}: {printable(reason)}" for peer, reason in candidate.rejects]
    lines += [f"  silent     {peer}" for peer in candidate.silent]
    until = f"until {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(candidate.until))}"
    lines += [f"to decide    {until if time.time() < candidate.until else 'the time is over'}"]
    lines += [f"this home    {candidate.decision}"] if candidate.decision else []
    return lines + (["", *score_table(candidate.scores, "then").splitlines()] if candidate.scores else [])
