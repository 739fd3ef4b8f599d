"""`p2pmodel status`, `log`, `doctor`, `id` and `fsck`."""

import typer

from p2pmodel.cli import options
from p2pmodel.cli.output import emit, plain, size, table
from p2pmodel.domain.ids import short

identity = typer.Typer(no_args_is_help=True, help="This home's key.")


@identity.command("show")
def show_identity(home: options.Home = None, json: options.Json = False) -> None:
    """The peer id that this home signs with; it is made at the first use."""
    from p2pmodel.store.home import Home

    folder = Home.open(home)
    peer = folder.key.peer
    emit({"peer": peer, "key": str(folder.key_path)}, f"{peer}\nkey file: {folder.key_path}", json)


def status(home: options.Home = None, json: options.Json = False) -> None:
    """Who serves which layers at which version, the round, and the head: as the node on this home sees it."""
    from p2pmodel.control.client import ControlClient
    from p2pmodel.node.reporting import status_data, status_text
    from p2pmodel.store.home import Home

    with ControlClient.connect(Home.open(home).control_socket) as client:
        reply = client.status()
    emit(status_data(reply), status_text(reply), json)


def log(model: options.Model = None, home: options.Home = None, json: options.Json = False) -> None:
    """The versions of a model, the newest first: their patches, verdicts and exam losses."""
    from p2pmodel.node.discovery import local_lineage
    from p2pmodel.store.home import Home

    lineage = local_lineage(Home.open(home), model)
    blocks = []
    for version in reversed(lineage.versions):
        c = version.candidate
        accepting = [v for v in version.verdicts if v.accept]
        lines = [
            f"{c.number}  {short(version.id)}  round {c.round}, {len(c.patches)} patches "
            f"by {c.merge.strategy}, α {c.alpha:g}, "
            f"accepted by {len(accepting)} of {len(lineage.manifest.maintainers)} maintainers"
        ]
        lines += [
            f"  merged    {short(p)}  {lineage.patches[p].contributor if p in lineage.patches else 'not here'}"
            for p in c.patches
        ]
        lines += [f"  left out  {short(x.patch)}  {x.reason}" for x in c.left_out]
        if accepting:
            rows = [
                [
                    s.domain,
                    f"{s.base:.4f}",
                    f"{s.parent:.4f}",
                    f"{s.candidate:.4f}",
                    f"{s.candidate / s.parent - 1:+.2%}",
                    f"{s.mean:.4f}",
                ]
                for s in accepting[0].scores
            ]
            body = table("", ["exam, nats per byte", "base", "parent", str(c.number), "change", "plain mean"], rows)
            lines += ["  " + line for line in body.splitlines()]
        blocks.append("\n".join(lines))
    blocks.append(
        f"{lineage.number(lineage.model)}  {short(lineage.model)}  the base: {lineage.manifest.name}, "
        f"{lineage.manifest.architecture}"
    )
    data = {
        "model": lineage.model,
        "name": lineage.manifest.name,
        "versions": [
            {
                "number": str(v.candidate.number),
                "id": v.id,
                "round": v.candidate.round,
                "alpha": v.candidate.alpha,
                "patches": plain(v.candidate.patches),
                "left_out": plain(v.candidate.left_out),
                "verdicts": plain(v.verdicts),
            }
            for v in lineage.versions
        ],
    }
    emit(data, "\n\n".join(blocks), json)


def doctor(home: options.Home = None, json: options.Json = False) -> None:
    """What works on this machine, what does not, and what to do about it."""
    from p2pmodel.node.checkup import examine_machine

    findings = examine_machine(home)
    marks = {"ok": "ok  ", "note": "note", "bad": "BAD "}
    emit(
        findings,
        "\n".join(f"{marks[f.level]}  {f.what}{'  → ' + f.advice if f.advice else ''}" for f in findings),
        json,
    )
    if any(f.level == "bad" for f in findings):
        raise typer.Exit(1)


def fsck(home: options.Home = None, json: options.Json = False) -> None:
    """Verify every object of the home, put corrupt ones aside, and rebuild the index."""
    from p2pmodel.domain.errors import StorageError
    from p2pmodel.store.fsck import fsck as check
    from p2pmodel.store.home import Home

    report = check(Home.open(home))
    emit(
        report,
        f"{report.objects} objects ({size(report.bytes)}), {report.records} records, {len(report.corrupt)} corrupt, "
        f"{len(report.dangling_refs)} dangling refs",
        json,
    )
    if report.corrupt or report.dangling_refs:
        raise StorageError(
            "The store was damaged.", "Corrupt objects are put aside and fetched again by the next node on this home."
        )
