"""`p2pmodel branch` and `merge-branches`: two lines of development over one base."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from p2pmodel.cli import options
from p2pmodel.cli.lineages import lineage_of
from p2pmodel.cli.output import counted, emit, size, table
from p2pmodel.domain.errors import UsageError
from p2pmodel.domain.ids import Digest, PeerId, short

if TYPE_CHECKING:
    from p2pmodel.node.lineages.lineage import Lineage
    from p2pmodel.node.patches.branch_merging import MergedBranch


def branch(
    name: Annotated[
        str | None, typer.Argument(help="Of the new lineage; without one, all over the same base are listed.")
    ] = None,
    version: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="VERSION",
            help="What it begins with: number (1.0.2), tag, id, `base` or `head`.",
            show_default="head",
        ),
    ] = None,
    maintainer: Annotated[
        list[str] | None,
        typer.Option("--maintainer", help="Peer id of a maintainer; may be repeated.", show_default="this home's key"),
    ] = None,
    threshold: Annotated[
        int | None, typer.Option("--threshold", help="How many maintainers have to accept a version.", show_default="1")
    ] = None,
    model: options.Model = None,
    peers: options.Peers = None,
    swarm_key: options.SwarmKey = None,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """Begin a lineage of your own with a version of another one; or list what has come of one base.

    The branch has the same base, slots, exam and schedule, and maintainers of its own. Its 1.0.0 has the values of the
    version that it begins with. The exam and these values come from the swarm where they are not on this machine.
    """
    lineage = lineage_of(home, model)
    if name is None:
        if any(given is not None for given in (version, maintainer, threshold, peers)):
            raise UsageError("Only a new branch has an origin and maintainers.", "Name it: p2pmodel branch NAME")
        return _list(lineage, json)
    from p2pmodel.logic.admission import MAX_EXAM_BYTES, result_limit
    from p2pmodel.node.versions.branching import branch as begin

    chosen = lineage.find_version(version or "head")
    maintainers = [PeerId(peer) for peer in maintainer or [lineage.home.key.peer]]
    limit = max(MAX_EXAM_BYTES, result_limit(lineage.manifest))
    key = lineage.home.swarm_key(swarm_key)

    def find(digest: Digest) -> bytes | None:
        from p2pmodel.node.lineages.finding import SwarmFinder  # loads hivemind, which a branch can mostly do without

        with SwarmFinder(lineage.home, peers or (), lineage.manifest.maintainers[0], limit, key) as swarm:
            return swarm.find(digest)

    made = begin(lineage, chosen, name, maintainers, threshold or 1, find)
    origin = made.founding.origin
    assert origin is not None
    emit(
        {"id": made.model, "name": name, "origin": origin, "maintainers": maintainers, "threshold": threshold or 1},
        f"model {made.model}\n{name} begins with {lineage.manifest.name} {lineage.number(chosen)} ({short(chosen)}); "
        f"{threshold or 1} of {len(maintainers)} maintainers adopt a version\n"
        f"host it with: p2pmodel join --maintain --model {name}",
        json,
    )


def _list(lineage: "Lineage", json: bool) -> None:
    from p2pmodel.node.lineages.branches import Family

    family = Family(lineage.home)
    rows, data = [], []
    for known in family.over_one_base(lineage):
        parting = family.parting(known, lineage)
        ahead, behind = (None, None) if parting is None else (len(parting.ahead), len(parting.behind))
        origin = known.founding.origin
        apart = "parted where is not known here" if parting is None else f"{ahead} ahead, {behind} behind"
        rows.append(
            [
                known.manifest.name,
                short(known.model),
                family.describe(origin) if origin else "the base",
                str(known.number(known.head)),
                "" if known.model == lineage.model else apart,
            ]
        )
        data.append(
            {
                "name": known.manifest.name,
                "id": known.model,
                "origin": origin,
                "head": str(known.number(known.head)),
                "ahead": ahead,
                "behind": behind,
            }
        )
    emit(data, table("", ["name", "id", "begins with", "head", f"against {lineage.manifest.name}"], rows), json)


def merge_branches(
    other: Annotated[str, typer.Argument(metavar="OTHER", help="Name or id of the lineage whose changes are wanted.")],
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MINE", help="The lineage that gets them.", show_default="the starter model"),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--kind",
            help="Of the patch: ia3 for vectors; dense, fish or lora for weights.",
            show_default="what holds the change best",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="The patch file.", dir_okay=False, show_default="OTHER-into-MINE")
    ] = None,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """Make a patch of what another lineage has changed since the two parted, weighed against your own changes."""
    from p2pmodel.node.lineages.discovery import local_lineage
    from p2pmodel.node.lineages.lineage import find_lineage
    from p2pmodel.node.patches.branch_merging import merge_branches as merge
    from p2pmodel.store.home import Home

    folder = Home.open(home)
    mine, others = local_lineage(folder, model), find_lineage(folder, other)
    path = output or Path(f"{others.manifest.name}-into-{mine.manifest.name}{options.PATCH_SUFFIX}")
    done = merge(mine, others, path, None if kind is None else options.versioned(kind))
    emit({"file": str(path), **vars(done)}, _text(done, mine, others, path), json)


def _text(done: "MergedBranch", mine: "Lineage", other: "Lineage", path: Path) -> str:
    since = f"since {' '.join(done.at)}"
    lines = [
        f"{other.manifest.name} has merged {counted(len(done.theirs), 'patch')} {since}: a change of norm "
        f"{done.their_norm:.4g}",
        f"{mine.manifest.name} has merged {counted(len(done.own), 'patch')} {since}: a change of norm "
        f"{done.own_norm:.4g}" + ("" if done.angle is None else f", {done.angle:.0f}° from the other"),
        f"patch {short(done.id)} of kind {done.patch.kind} on {mine.manifest.name} {mine.number(mine.head)}, weighed "
        f"by the Fishers of both: norm {done.norm:.4g}, {size(done.size)}",
    ]
    if done.kept < 1:
        lines.append(f"{done.kept:.1%} of the update's squared norm has room in factors")
    if done.dropped:
        lines.append(f"{counted(len(done.dropped), 'slot')} that changed there {mine.manifest.name} does not have")
    if done.left:
        lines.append(f"{counted(len(done.left), 'slot')} that changed there are of another kind: merge them afterwards")
    lines.append(f"written to {path}; try it with: p2pmodel test {path}")
    lines.append(f"give it to the round with: p2pmodel patch publish {path}")
    return "\n".join(lines)
