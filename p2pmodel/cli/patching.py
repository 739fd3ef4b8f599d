"""`p2pmodel train` and `p2pmodel patch`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from p2pmodel.cli import options
from p2pmodel.cli.output import emit, size, table
from p2pmodel.domain.ids import short

app = typer.Typer(no_args_is_help=True, help="Publish patches and look at them.")

PatchText = Annotated[str, typer.Argument(metavar="PATCH", help="A patch file, or the id of a known patch.")]


def train(
    data: Annotated[list[Path], typer.Option("--data", help="Text file to learn from; may be repeated.")],
    kind: Annotated[str, typer.Option("--kind", help="Kind of patch.")] = "ia3",
    steps: Annotated[int | None, typer.Option("--steps", min=1, show_default="by the kind")] = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1)] = None,
    sequence: Annotated[int | None, typer.Option("--sequence", help="Tokens in an example.", min=8)] = None,
    fisher_examples: Annotated[
        int | None, typer.Option("--fisher-examples", help="Examples that the Fisher is the mean of.", min=1)
    ] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", min=0.0)] = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    version: options.Version = "head",
    licence: Annotated[str, typer.Option("--licence", help="SPDX licence of the data.")] = "",
    output: Annotated[
        Path | None, typer.Option("--output", dir_okay=False, show_default="<data>-<version>.p2patch")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, show_default="all cores")] = None,
    model: options.Model = None,
    base: options.Base = None,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """Train a patch on your own data, on this machine."""
    import dataclasses
    import sys

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from p2pmodel.engine.training import TrainingOptions
    from p2pmodel.node.bases import find_base
    from p2pmodel.node.contributing import train_patch
    from p2pmodel.node.discovery import local_lineage
    from p2pmodel.node.threads import use_threads
    from p2pmodel.store.home import Home
    from p2pmodel.store.scratch import Scratch

    use_threads(threads)
    folder = Home.open(home)
    lineage = local_lineage(folder, model)
    parent = lineage.find_version(version)
    chosen: dict[str, Any] = {
        "steps": steps,
        "batch": batch,
        "sequence": sequence,
        "learning_rate": learning_rate,
        "fisher_examples": fisher_examples,
    }
    settings = dataclasses.replace(TrainingOptions(seed=seed), **{k: v for k, v in chosen.items() if v is not None})
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("training", total=settings.steps, loss="-")
        new = train_patch(
            folder,
            lineage,
            find_base(folder, lineage, base),
            parent,
            data,
            f"{kind}@1",
            settings,
            licence,
            lambda step, loss: bar.update(task, completed=step, loss=f"{loss:.3f}"),
        )
    path = output or Path(f"{data[0].stem}-{lineage.number(parent)}.p2patch")
    Scratch(path.resolve().parent).write(path, new.file, 0o644)
    number = lineage.number(parent)
    emit(
        {
            "file": str(path),
            "id": new.id,
            "parent": str(number),
            "loss_before": new.patch.loss_before,
            "loss_after": new.patch.loss_after,
            "bytes": len(new.file),
            "adapter_bytes": new.patch.adapter.size,
            "fisher_bytes": new.patch.fisher.size,
            "samples": new.patch.samples,
        },
        f"held-out loss {new.patch.loss_before:.4f} before, {new.patch.loss_after:.4f} after (nats per token)\n"
        f"patch {short(new.id)} on {lineage.manifest.name} {number}: {size(len(new.file))} "
        f"(adapter {size(new.patch.adapter.size)}, Fisher {size(new.patch.fisher.size)})\n"
        f"written to {path}; give it to the swarm with: p2pmodel patch publish {path}",
        json,
    )


@app.command()
def publish(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A patch file.")],
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """Announce a patch to the swarm, through the node that runs on this home."""
    from p2pmodel.control.client import ControlClient
    from p2pmodel.node.intake import take_in
    from p2pmodel.node.lineage import Lineage
    from p2pmodel.store.home import Home
    from p2pmodel.wire.bundle import open_bundle

    folder = Home.open(home)
    with ControlClient.connect(folder.control_socket) as client:
        raw = file.read_bytes()
        record = take_in(Lineage(folder, open_bundle(raw).patch.model), raw)
        client.publish(record.digest)
    emit({"id": record.digest}, f"patch {short(record.digest)} is announced; follow it with: p2pmodel patch list", json)


@app.command()
def show(patch: PatchText, home: options.Home = None, json: options.Json = False) -> None:
    """What a patch changes, and what it was trained on."""
    from p2pmodel.node.patchbook import read_patch

    entry = read_patch(home, patch)
    recipe, noun = entry.patch.provenance.recipe, entry.patch
    lines = [
        f"patch        {entry.id}",
        f"kind         {noun.kind}",
        f"contributor  {noun.contributor}",
        f"model        {entry.model_name} ({short(noun.model)})",
        f"parent       {entry.parent_number} ({short(noun.parent)})",
        f"size         adapter {size(noun.adapter.size)}, Fisher {size(noun.fisher.size)}",
        f"loss         {noun.loss_before:.4f} before, {noun.loss_after:.4f} after, in nats per token, "
        "as its contributor says",
        f"recipe       {recipe.steps} steps of {recipe.batch} × {recipe.sequence} tokens, "
        f"{recipe.optimizer} at {recipe.learning_rate:g}, seed {recipe.seed}",
        f"software     {', '.join(' '.join(pair) for pair in noun.provenance.software)}",
        f"licence      {noun.licence or 'not stated'}",
        f"state        {entry.state}",
    ]
    lines += [f"data         {d.name}, {size(d.size)}, SHA-256 {short(d.digest)}…" for d in noun.provenance.data]
    emit({"id": entry.id, "state": entry.state, "patch": noun}, "\n".join(lines), json)


@app.command()
def verify(patch: PatchText, home: options.Home = None, json: options.Json = False) -> None:
    """Check a patch as every peer does: signature, digests, parent, slots, shapes, values, limits."""
    from p2pmodel.node.patchbook import verify_patch

    entry = verify_patch(home, patch)
    emit(
        {"id": entry.id, "valid": True},
        f"patch {short(entry.id)} is valid: signed by {entry.patch.contributor}, "
        f"on {entry.model_name} {entry.parent_number}",
        json,
    )


@app.command("list")
def list_patches(model: options.Model = None, home: options.Home = None, json: options.Json = False) -> None:
    """The patches that this home knows, and what became of them."""
    from p2pmodel.node.discovery import local_lineage
    from p2pmodel.node.patchbook import entries
    from p2pmodel.store.home import Home

    known = entries(local_lineage(Home.open(home), model))
    rows = [
        [
            short(e.id),
            e.parent_number,
            e.patch.kind,
            e.patch.contributor[-8:],
            size(e.patch.adapter.size + e.patch.fisher.size),
            e.state,
        ]
        for e in known
    ]
    emit(
        [
            {
                "id": e.id,
                "parent": e.parent_number,
                "kind": e.patch.kind,
                "contributor": e.patch.contributor,
                "state": e.state,
            }
            for e in known
        ],
        table("", ["patch", "parent", "kind", "contributor", "size", "state"], rows)
        if rows
        else "No patches are known here; make one with: p2pmodel train --data FILE",
        json,
    )
