"""`p2pmodel rebase`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from p2pmodel.cli import options
from p2pmodel.cli.output import demand_place, emit, plain, size, table
from p2pmodel.domain.errors import UsageError
from p2pmodel.domain.ids import short

if TYPE_CHECKING:
    from p2pmodel.node.lineages.lineage import Lineage

SHOWN_SLOTS = 8


def rebase(
    patch: options.PatchArgument,
    onto: Annotated[
        str, typer.Option("--onto", metavar="VERSION", help="Number (1.0.2), tag, id, `base` or `head`.")
    ] = "head",
    evaluate: Annotated[
        list[Path] | None,
        typer.Option("--eval", help="Text of yours to compare on; may be repeated.", exists=True, dir_okay=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="The new patch file.", dir_okay=False, show_default="<id>-<version>")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="With another base: the model it goes to.", show_default="the patch's")
    ] = None,
    base: options.Base = None,
    old_base: Annotated[
        Path | None,
        typer.Option("--old-base", help="Folder of the patch's own base, with --eval.", exists=True, file_okay=False),
    ] = None,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """Move a patch to a newer version, without its data: by merging, weighted by what each depends on."""
    from p2pmodel.node.lineages.bases import find_base
    from p2pmodel.node.lineages.discovery import local_lineage
    from p2pmodel.node.patches.patchbook import open_patch
    from p2pmodel.node.patches.rebasing import rebase as move

    opened = open_patch(home, patch)
    folder = opened.lineage.home
    lineage: Lineage = opened.lineage if model is None else local_lineage(folder, model)
    if old_base is not None and not evaluate:
        raise UsageError("--old-base is of use only with --eval.", "Leave it out.")
    version = lineage.find_version(onto)
    number = lineage.number(version)
    bases = None
    if evaluate:
        new = find_base(folder, lineage, base)
        same = opened.lineage.model == lineage.model
        bases = (new if same else find_base(folder, opened.lineage, old_base), new)
    path = output or Path(f"{short(opened.id)}-{number}{options.PATCH_SUFFIX}")
    demand_place(path)
    done = move(opened, lineage, version, path, texts=evaluate or (), bases=bases)
    how = (
        "both sides weighed the same, since not all patches of the version are here"
        if done.weighted is None
        else f"weighed by the Fishers of the patch and of {done.weighted} merged patches"
    )
    lines = [
        f"patch {short(done.id)} of kind {done.patch.kind} on {lineage.manifest.name} {number}: {size(done.size)}, "
        + how
    ]
    if done.kept < 1:
        lines.append(f"{done.kept:.1%} of the update's squared norm has room in factors of the patch's rank")
    if done.dropped:
        more = len(done.dropped) - SHOWN_SLOTS
        lines.append(f"{len(done.dropped)} slots are not in the new model, or of another shape, and were left out:")
        lines += [f"  {name}" for name in done.dropped[:SHOWN_SLOTS]] + ([f"  and {more} more"] if more > 0 else [])
    if found := done.losses:
        rows = [
            ["the old version with the patch", f"{found.before:.4f}", ""],
            ["the new version alone", f"{found.version:.4f}", f"{found.version / found.before - 1:+.2%}"],
            ["the new version, rebased patch", f"{found.rebased:.4f}", f"{found.rebased / found.before - 1:+.2%}"],
        ]
        lines.append(table("", [f"your {found.bytes} bytes", "nats per byte", "change"], rows))
    lines.append(f"written to {path}; give it to the swarm with: p2pmodel patch publish {path}")
    data = {"file": str(path), "id": done.id, "version": version, "number": str(number), "losses": plain(done.losses)}
    data |= {"dropped": done.dropped, "weighted": done.weighted, "kept": done.kept, "bytes": done.size}
    emit(data, "\n".join(lines), json)
