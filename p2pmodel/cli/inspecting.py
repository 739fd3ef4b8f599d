"""`p2pmodel status`, `log`, `doctor` and `fsck`."""

import contextlib
from typing import TYPE_CHECKING, Annotated

import typer

from p2pmodel.cli import options
from p2pmodel.cli.lineages import lineage_of
from p2pmodel.cli.output import emit, plain, printable, size
from p2pmodel.cli.versioning import score_table
from p2pmodel.domain.errors import UsageError
from p2pmodel.domain.ids import PatchId, short
from p2pmodel.domain.version import BASE_NUMBER

if TYPE_CHECKING:
    from p2pmodel.domain.version import Version
    from p2pmodel.node.lineages.branches import Family
    from p2pmodel.node.lineages.lineage import Lineage


def status(
    watch: Annotated[bool, typer.Option("--watch", help="Stay, and show it as it changes; Ctrl-C ends this.")] = False,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """Who serves which layers at which version, the round, and the head: as the node on this home sees it."""
    if watch:
        if json:
            raise UsageError("--watch and --json exclude each other.", "Ask for --json again and again.")
        from p2pmodel.cli import watching

        return watching.watch(home)
    from p2pmodel.cli.status_text import status_data, status_text
    from p2pmodel.control.client import ControlClient
    from p2pmodel.store.home import Home

    with ControlClient.connect(Home.open(home).control_socket) as client:
        reply = client.status()
    emit(status_data(reply), status_text(reply), json)


def log(
    graph: Annotated[bool, typer.Option("--graph", help="Draw the history, with the patches of each version.")] = False,
    model: options.Model = None,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """The versions of a model, the newest first: their patches, verdicts and exam losses."""
    from p2pmodel.node.lineages.branches import Family

    lineage = lineage_of(home, model)
    family = Family(lineage.home)
    data = {
        "model": lineage.model,
        "name": lineage.manifest.name,
        "origin": plain(lineage.founding.origin),
        "branches": [{"name": x.manifest.name, "id": x.model, "from": v} for v, x in family.branches(lineage)],
        "tags": lineage.notes.tags,
        "versions": [
            {
                "number": str(v.candidate.number),
                "id": v.id,
                "parent": v.candidate.parent,
                "round": v.candidate.round,
                "alpha": v.candidate.alpha,
                "patches": plain(v.candidate.patches),
                "left_out": plain(v.candidate.left_out),
                "verdicts": plain(v.verdicts),
            }
            for v in lineage.versions
        ],
    }
    emit(data, _graph(lineage, family) if graph else _list(lineage, family), json)


def _graph(lineage: "Lineage", family: "Family") -> str:
    from p2pmodel.cli.graph import Commit, draw

    chain = {lineage.model, *(version.id for version in lineage.versions)}
    title, origin = _title(lineage, family, lineage.model, str(BASE_NUMBER)), lineage.founding.origin
    if origin is None:
        commits = [Commit(lineage.model, None, f"{title}  the base: {lineage.manifest.name}")]
    else:
        commits = [
            Commit(origin.version, None, f"{origin.number}  {short(origin.version)}  of {family.name(origin.model)}"),
            Commit(lineage.model, origin.version, f"{title}  {lineage.manifest.name} branches off"),
        ]
    for version in lineage.history():
        c = version.candidate
        lost = "" if version.id in chain else "  not in the chain: another version was adopted on the same parent"
        commits.append(
            Commit(
                version.id,
                c.parent,
                f"{_title(lineage, family, version.id, str(c.number))}  {_made(lineage, version)}{lost}",
                [f"{short(p)}  {_contributor(lineage, p)}" for p in c.patches],
                [f"{short(x.patch)}  left out: {printable(x.reason)}" for x in c.left_out],
            )
        )
    return draw(commits)


def _list(lineage: "Lineage", family: "Family") -> str:
    blocks = []
    for version in reversed(lineage.versions):
        c = version.candidate
        lines = [f"{_title(lineage, family, version.id, str(c.number))}  {_made(lineage, version)}"]
        lines += [f"  merged    {short(p)}  {_contributor(lineage, p)}" for p in c.patches]
        lines += [f"  left out  {short(x.patch)}  {printable(x.reason)}" for x in c.left_out]
        if version.scores:
            lines += ["  " + line for line in score_table(version.scores, str(c.number)).splitlines()]
        blocks.append("\n".join(lines))
    base, origin = _title(lineage, family, lineage.model, str(BASE_NUMBER)), lineage.founding.origin
    what = f"branches off {family.describe(origin)}" if origin else "the base"
    blocks.append(f"{base}  {what}: {lineage.manifest.name}, {lineage.manifest.architecture}")
    return "\n\n".join(blocks)


def _title(lineage: "Lineage", family: "Family", version: str, number: str) -> str:
    names = ["head"] if version == lineage.head else []
    names += [f"tag {name}" for name, target in lineage.notes.tags.items() if target == version]
    names += [f"branch {x.manifest.name}" for origin, x in family.branches(lineage) if origin == version]
    return f"{number}  {short(version)}" + (f"  ({', '.join(names)})" if names else "")


def _made(lineage: "Lineage", version: "Version") -> str:
    from p2pmodel.node.rounds.roundview import describe

    c = version.candidate
    return (
        f"round {c.round}, {describe(lineage, c)}, "
        f"accepted by {len(version.verdicts)} of {len(lineage.manifest_at(c.parent).maintainers)} maintainers"
    )


def _contributor(lineage: "Lineage", patch: PatchId) -> str:
    return lineage.patches[patch].contributor if patch in lineage.patches else "not here"


def doctor(
    peers: Annotated[
        list[str] | None,
        typer.Option("--peers", help="Multiaddr of a peer to reach, and to compare clocks with; may be repeated."),
    ] = None,
    host: Annotated[
        str | None, typer.Option("--host", help="Address that join would listen on.", show_default="as join")
    ] = None,
    port: Annotated[
        int | None, typer.Option("--port", help="Port that join would take.", show_default="as join", min=0, max=65534)
    ] = None,
    swarm_key: options.SwarmKey = None,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """What works on this machine, what does not, and what to do about it; something bad ends with status 1.

    With --peers it also says whether these can be reached from here. So that you know whether your own node can be
    reached from outside, run it on another machine with your node's address.
    """
    from p2pmodel.node.machine.diagnosis import diagnose

    findings = diagnose(home, tuple(peers or ()), host, port, swarm_key)
    marks = {"ok": "ok  ", "note": "note", "bad": "BAD "}
    lines = [
        f"{marks[f.level]}  {f.topic:<8}  {f.what}" + (f"\n{'':16}→ {f.advice}" if f.advice else "") for f in findings
    ]
    emit(findings, "\n".join(lines), json)
    if any(f.level == "bad" for f in findings):
        raise typer.Exit(1)


def fsck(home: options.Home = None, json: options.Json = False) -> None:
    """Verify every object of the home, put corrupt ones aside, rebuild the index, and look for all versions' values."""
    from p2pmodel.domain.errors import NotFound, StorageError
    from p2pmodel.node.lineages.lineage import Lineage
    from p2pmodel.store.fsck import fsck as check
    from p2pmodel.store.home import Home

    folder = Home.open(home)
    report = check(folder)
    lost: list[str] = []
    for model in folder.index.models():
        with contextlib.suppress(NotFound):  # its Manifest was put aside
            lineage = Lineage(folder, model)
            missing = [v for v in lineage.versions if not folder.objects.has(v.candidate.result.digest)]
            lost += [f"{lineage.manifest.name} {version.candidate.number}" for version in missing]
    emit(
        plain(report) | {"lost_versions": lost},
        f"{report.objects} objects ({size(report.bytes)}), {report.records} records, {len(report.corrupt)} corrupt, "
        f"{len(report.dangling_refs)} dangling refs, {len(lost)} versions without their values",
        json,
    )
    if lost:
        advice = "Those of a head are fetched by the next node on this home."
        raise StorageError(f"The values of {', '.join(lost)} are not here.", advice)
    if report.corrupt or report.dangling_refs:
        raise StorageError(
            "The store was damaged.", "Corrupt objects are put aside and fetched again by the next node on this home."
        )
