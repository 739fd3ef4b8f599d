"""`p2pmodel patch export`, `patch import` and `version export`: to other programs, and from them."""

from pathlib import Path
from typing import Annotated

import typer

from p2pmodel.cli import options
from p2pmodel.cli.lineages import lineage_of
from p2pmodel.cli.output import demand_place, emit, size
from p2pmodel.domain.errors import UsageError
from p2pmodel.domain.ids import short


def export(
    patch: options.PatchArgument,
    peft: Annotated[
        Path | None, typer.Option("--peft", help="Folder for an adapter that peft loads.", file_okay=False)
    ] = None,
    merged: Annotated[
        Path | None,
        typer.Option("--merged", help="Folder for a whole checkpoint with the patch in it.", file_okay=False),
    ] = None,
    onto: Annotated[
        Path | None,
        typer.Option("--onto", help="With --peft: the exported version that the adapter goes on.", exists=True),
    ] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="With --merged: fp32, bf16 or fp16.")] = None,
    base: options.Base = None,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """Write a patch for other programs: an adapter of peft, or a whole checkpoint of transformers."""
    if (peft is None) == (merged is None) or (onto and not peft) or (dtype and not merged):
        raise UsageError("A patch is exported with --peft DIR (and --onto), or with --merged DIR (and --dtype).")
    from p2pmodel.node.lineages.bases import find_base
    from p2pmodel.node.patches.exporting import export_adapter, export_merged
    from p2pmodel.node.patches.patchbook import open_patch

    opened = open_patch(home, patch)
    lineage = opened.lineage
    folder_of_base = find_base(lineage.home, lineage, base)
    if peft is not None:
        done = export_adapter(opened, folder_of_base, peft, onto)
        hint = "load it with: PeftModel.from_pretrained(model, DIR)"
    else:
        assert merged is not None
        done = export_merged(lineage, folder_of_base, merged, opened.patch.parent, opened, dtype)
        hint = f"its logits differ by {done.difference:.1g} of their spread at most, before they are rounded"
    emit(
        {"folder": str(done.folder), "files": done.files, "difference": done.difference},
        f"patch {short(opened.id)} is in {done.folder}: {', '.join(done.files)}\n{hint}",
        json,
    )


def import_(
    adapter: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder that peft wrote.")],
    output: Annotated[
        Path | None, typer.Option("--output", help="The patch file.", dir_okay=False, show_default="ADAPTER.p2patch")
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", help="What it was trained on, or alike; its Fisher is of these.", exists=True),
    ] = None,
    assume_base: Annotated[
        bool, typer.Option("--assume-base", help="It was trained on the version, whatever it calls that.")
    ] = False,
    version: Annotated[
        str | None, typer.Option("--version", help="That it was trained on.", show_default="what it names")
    ] = None,
    licence: Annotated[str, typer.Option("--licence", help="Of the patch, as an SPDX identifier.")] = "",
    model: options.Model = None,
    base: options.Base = None,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """Make a patch of an adapter that was trained with peft: (IA)³ or LoRA, in safetensors."""
    from p2pmodel.node.lineages.bases import find_base
    from p2pmodel.node.patches.importing import FLAT, import_adapter

    lineage = lineage_of(home, model)
    path = output or Path(f"{adapter.resolve().name}{options.PATCH_SUFFIX}")
    demand_place(path)
    done = import_adapter(
        lineage,
        find_base(lineage.home, lineage, base),
        adapter,
        path,
        version=None if version is None else lineage.find_version(version),
        files=tuple(data or ()),
        assume_base=assume_base,
        licence=licence,
    )
    number = lineage.number(done.patch.parent)
    fisher = "flat, so that all of its values weigh the same" if done.fisher == FLAT else "measured on the data"
    following = (
        f"give it to the swarm with: p2pmodel patch publish {path}"
        if done.patch.parent == lineage.head
        else f"move it to the head with: p2pmodel rebase {path} --onto head"
    )
    emit(
        {"file": str(path), "id": done.id, "parent": str(number), "fisher": done.fisher, "bytes": done.size},
        f"patch {short(done.id)} of kind {done.patch.kind} on {lineage.manifest.name} {number}: {size(done.size)}; "
        f"its Fisher is {fisher}\nwritten to {path}; {following}",
        json,
    )


def export_version(
    version: options.VersionArgument,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New or empty.", file_okay=False)],
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="fp32, bf16 or fp16.", show_default="that of the base")
    ] = None,
    model: options.Model = None,
    base: options.Base = None,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """Write a version as a whole checkpoint that transformers loads, with its values in the weights."""
    from p2pmodel.node.lineages.bases import find_base
    from p2pmodel.node.patches.exporting import export_merged

    lineage = lineage_of(home, model)
    chosen = lineage.find_version(version)
    done = export_merged(lineage, find_base(lineage.home, lineage, base), folder, chosen, dtype=dtype)
    emit(
        {"folder": str(folder), "id": chosen, "files": done.files, "difference": done.difference},
        f"{lineage.manifest.name} {lineage.number(chosen)} is in {folder}: {', '.join(done.files)}\n"
        f"its logits differ by {done.difference:.1g} of their spread at most, before they are rounded",
        json,
    )
