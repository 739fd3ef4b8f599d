"""`p2pmodel show`, `diff`, `checkout`, `tag` and `version`: versions as people know commits."""

from pathlib import Path
from typing import Annotated

import typer

from p2pmodel.cli import interchange, options
from p2pmodel.cli.lineages import lineage_of
from p2pmodel.cli.output import emit, plain, printable, size, table
from p2pmodel.domain.errors import NotFound, UsageError
from p2pmodel.domain.ids import short
from p2pmodel.domain.version import BASE_NUMBER, DomainScore

app = typer.Typer(no_args_is_help=True, help="Check versions, and write them for other programs.")
app.command("export")(interchange.export_version)

SHOWN_SLOTS = 12
VersionOrFolder = Annotated[
    str, typer.Argument(metavar="VERSION|DIR", help="A version, or a folder that `checkout` wrote.")
]


def figure(section: str, score: float) -> str:
    """Nats per byte, or the share of failed cases."""
    return f"{score:.1%}" if "/" in section else f"{score:.4f}"


def score_change(section: str, before: float, after: float) -> str:
    """Relative for a loss, a difference for a share."""
    if "/" in section:
        return f"{after - before:+.1%}"
    return f"{after / before - 1:+.2%}" if before else "-"


def score_table(scores: tuple[DomainScore, ...], number: str) -> str:
    rows = [
        [
            s.domain,
            *(figure(s.domain, score) for score in (s.base, s.parent, s.candidate)),
            score_change(s.domain, s.parent, s.candidate),
            "-" if s.mean is None else figure(s.domain, s.mean),
        ]
        for s in scores
    ]
    return table("", ["exam: nats per byte, % failed", "base", "parent", number, "change", "plain mean"], rows)


def show(
    version: options.VersionArgument = "head",
    model: options.Model = None,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """One version: where it comes from, what was merged and left out, who adopted it, and its exam."""
    lineage = lineage_of(home, model)
    chosen = lineage.find_version(version)
    manifest = lineage.manifest
    tags = [name for name, target in lineage.notes.tags.items() if target == chosen]
    lines = [
        f"version      {lineage.number(chosen)}{' (head)' if chosen == lineage.head else ''}",
        f"id           {chosen}",
    ]
    lines += [f"tags         {', '.join(tags)}"] if tags else []
    lines += [f"model        {manifest.name} ({short(lineage.model)})"]
    if chosen == lineage.model:
        lines += [f"base         {manifest.architecture}, {manifest.layers} layers, {len(manifest.slots)} slots"]
        data = {"id": chosen, "number": str(lineage.number(chosen)), "tags": tags}
        if manifest.origin is not None:
            from p2pmodel.node.lineages.branches import Family

            lines.append(f"values       of {Family(lineage.home).describe(manifest.origin)}, where it branched off")
            data["origin"] = plain(manifest.origin)
        emit(data, "\n".join(lines), json)
        return
    from p2pmodel.node.rounds.roundview import describe

    known = lineage.version(chosen)
    candidate = known.candidate
    proposer = lineage.proposers[chosen][0]
    lines += [
        f"parent       {lineage.number(candidate.parent)} ({short(candidate.parent)})",
        f"round        {candidate.round}, proposed by {proposer}",
        f"what         {describe(lineage, candidate)}",
        f"values       {size(candidate.result.size)}, SHA-256 {candidate.result.digest}"
        + ("" if lineage.home.objects.has(candidate.result.digest) else ", not on this machine"),
    ]
    if candidate.experts:
        lines += [f"experts      {', '.join(f'{expert.name} (rank {expert.rank})' for expert in candidate.experts)}"]
    for patch_id in candidate.patches:
        patch = lineage.patches.get(patch_id)
        lines.append(f"merged       {short(patch_id)}  {patch.contributor if patch else 'not here'}")
        for file in patch.provenance.data if patch else ():
            licence = printable(file.licence) or "licence not stated"
            lines.append(f"               trained on {printable(file.name)}, {size(file.size)}, {licence}")
    lines += [f"left out     {short(x.patch)}  {printable(x.reason)}" for x in candidate.left_out]
    lines += [f"adopted by   {verdict.maintainer}" for verdict in known.verdicts]
    if known.scores:
        lines += ["", *score_table(known.scores, str(candidate.number)).splitlines()]
    data = {
        "id": chosen,
        "number": str(candidate.number),
        "tags": tags,
        "proposer": proposer,
        "candidate": plain(candidate) | {"number": str(candidate.number)},
        "verdicts": plain(known.verdicts),
    }
    emit(data, "\n".join(lines), json)


def diff(
    before: options.VersionArgument,
    after: options.VersionArgument = "head",
    everything: Annotated[bool, typer.Option("--all", help="Every slot that differs, not only the largest.")] = False,
    model: options.Model = None,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """What lies between two versions: slots by how much they changed, and the exam."""
    from p2pmodel.node.versions.comparing import compare

    lineage = lineage_of(home, model)
    a, b = lineage.find_version(before), lineage.find_version(after)
    found = compare(lineage, a, b)
    numbers = [str(lineage.number(version)) for version in (a, b)]
    shown = found.slots if everything else found.slots[:SHOWN_SLOTS]
    rows = [
        [c.slot, f"{c.norm:.4g}", f"{c.relative:.2%}", f"{c.changed}/{c.elements}", f"{c.largest:+.4g} at {c.at}"]
        for c in shown
    ]
    parts = [f"{numbers[0]} ({short(a)}) → {numbers[1]} ({short(b)})"]
    parts += [table("", ["slot", "norm", "relative", "changed", "largest"], rows)] if rows else []
    rest = len(found.slots) - len(shown)
    parts += [f"experts added: {', '.join(found.added)}"] if found.added else []
    parts += [f"experts removed: {', '.join(found.removed)}"] if found.removed else []
    more = f"{rest} more slots differ (--all shows them), " if rest else ""
    parts.append(f"{more}{found.untouched} slots are the same")
    if found.scores:
        scores = [
            [
                s.section,
                figure(s.section, s.before),
                figure(s.section, s.after),
                score_change(s.section, s.before, s.after),
            ]
            for s in found.scores
        ]
        parts.append(table("", ["exam: nats per byte, % failed", *numbers, "change"], scores))
    emit({"before": a, "after": b, **plain(found)}, "\n\n".join(parts), json)


def checkout(
    version: options.VersionArgument,
    output: Annotated[Path | None, typer.Option("--output", file_okay=False, show_default="<model>-<version>")] = None,
    with_base: Annotated[
        bool, typer.Option("--with-base", help="The base checkpoint's files too, as hard links where possible.")
    ] = False,
    model: options.Model = None,
    base: options.Base = None,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """Write a version into a folder, bit for bit, with its proof. What this home serves does not change."""
    from p2pmodel.node.lineages.bases import find_base
    from p2pmodel.node.versions.checkout import check_out

    lineage = lineage_of(home, model)
    chosen = lineage.find_version(version)
    folder = output or Path(f"{lineage.manifest.name}-{lineage.number(chosen)}")
    source = find_base(lineage.home, lineage, base) if with_base or base else None
    names = check_out(lineage, chosen, folder, source)
    emit(
        {"folder": str(folder), "id": chosen, "number": str(lineage.number(chosen)), "files": names},
        f"{lineage.manifest.name} {lineage.number(chosen)} is in {folder}: {', '.join(names)}\n"
        f"check it anywhere with: p2pmodel version verify {folder}",
        json,
    )


def deps(
    version: VersionOrFolder = "head",
    model: options.Model = None,
    base: options.Base = None,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """What a version needs to run, and whether it is here; what is missing ends with status 3."""
    from p2pmodel.node.versions.needs import needs_of, needs_of_folder

    if Path(version).is_dir():
        needs = needs_of_folder(Path(version))
    else:
        lineage = lineage_of(home, model)
        needs = needs_of(lineage, lineage.find_version(version), base)
    rows = [[n.kind, n.name, n.wanted, n.found or "-", "ok" if n.met else "MISSING"] for n in needs]
    emit(needs, table("", ["kind", "name", "needed", "here", ""], rows), json)
    if missing := [need.name for need in needs if not need.met]:
        raise NotFound(f"What {version} needs is not all here: {', '.join(missing)}.")


def tag(
    name: Annotated[str | None, typer.Argument(help="Of the tag; without one, all tags are listed.")] = None,
    version: options.VersionArgument = "head",
    force: Annotated[bool, typer.Option("--force", help="Move a tag that is there.")] = False,
    delete: Annotated[bool, typer.Option("--delete", help="Take the tag away.")] = False,
    model: options.Model = None,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """Name a version, for this home alone; every command takes the name for the version."""
    lineage = lineage_of(home, model)
    if name is None:
        if force or delete:
            raise UsageError("--force and --delete need the name of a tag.", "Name it.")
        tags = lineage.notes.tags
        numbers = {v.id: str(v.candidate.number) for v in lineage.versions} | {lineage.model: str(BASE_NUMBER)}
        rows = [[tagged, numbers.get(target, "unknown"), short(target)] for tagged, target in tags.items()]
        emit(
            tags,
            table("", ["tag", "version", "id"], rows) if rows else "No tags; make one with: p2pmodel tag NAME",
            json,
        )
        return
    if delete:
        lineage.notes.untag(name)
        emit({"tag": name, "deleted": True}, f"tag {name} is deleted", json)
        return
    chosen = lineage.find_version(version)
    lineage.notes.tag(name, chosen, move=force)
    emit({"tag": name, "id": chosen}, f"{name} is {lineage.manifest.name} {lineage.number(chosen)}", json)


def rollback(
    version: options.VersionArgument,
    agree: Annotated[
        bool, typer.Option("--agree", help="Only agree: another maintainer proposes it. Before the proposal.")
    ] = False,
    model: options.Model = None,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """Propose a new version with the values of an old one; maintainers adopt it who agreed to it."""
    from p2pmodel.control.client import ControlClient
    from p2pmodel.node.rounds.asides import agree_to_rollback, propose_rollback

    lineage = lineage_of(home, model)
    chosen = lineage.find_version(version)
    number, head = lineage.number(chosen), lineage.number(lineage.head)
    if agree:
        agree_to_rollback(lineage, chosen)
        emit(
            {"agreed": chosen, "head": lineage.head},
            f"This home's maintainer accepts a rollback from {head} to {number}.",
            json,
        )
        return
    with ControlClient.connect(lineage.home.control_socket) as client:
        record, proposed = propose_rollback(lineage, chosen)
        client.publish(record)
    emit(
        {"id": proposed, "restores": chosen},
        f"version {short(proposed)}, which restores {number}, is proposed; follow it with: p2pmodel log",
        json,
    )


@app.command()
def verify(
    version: VersionOrFolder = "head",
    model: options.Model = None,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """Prove a version from the Manifest on, offline: every signature, number, threshold, and the values' digests."""
    from p2pmodel.node.versions.checkout import verify_folder, verify_version

    where = ""
    if Path(version).is_dir():
        (proven, files), here = verify_folder(Path(version)), None
        values = "its values are those that were adopted"
        values += f", and its {files} files are the base's" if files else ", and the base's files are not beside them"
        if origin := proven.manifest.origin:
            where = f"; it begins with {short(origin.model)} {origin.number}, by what its Manifest says"
    else:
        lineage = lineage_of(home, model)
        proven, here = verify_version(lineage, lineage.find_version(version))
        values = f"the values of {here} of {len(proven.versions)} are here"
        if origin := proven.manifest.origin:
            from p2pmodel.node.lineages.branches import Family
            from p2pmodel.node.lineages.origins import proven_origins

            family = Family(lineage.home)
            here_too = "is proven too" if proven_origins(family, lineage) else "is not known here"
            where = f"; it begins with {family.describe(origin)}, which {here_too}"
    count = len(proven.versions)
    emit(
        {"id": proven.id, "number": proven.number, "model": proven.model, "versions": count, "values": here},
        f"{proven.manifest.name} {proven.number} ({short(proven.id)}) is proven: {count} version{'s' * (count != 1)} "
        f"after the base, each accepted by {proven.manifest.threshold} of {len(proven.manifest.maintainers)} "
        f"maintainers or more; {values}" + where,
        json,
    )
