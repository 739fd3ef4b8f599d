"""`p2pmodel patch`."""

from pathlib import Path
from typing import Annotated

import typer

from p2pmodel.cli import options
from p2pmodel.cli.output import emit, size, table
from p2pmodel.domain.ids import short

app = typer.Typer(no_args_is_help=True, help="Publish patches and look at them.")

PatchText = Annotated[str, typer.Argument(metavar="PATCH", help="A patch file, or the id of a known patch.")]


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
def show(
    patch: PatchText,
    recipe_only: Annotated[
        bool, typer.Option("--recipe", help="Print how it was trained, as TOML for: p2pmodel train --recipe")
    ] = False,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """What a patch changes, and what it was trained on."""
    from p2pmodel.cli.recipes import recipe_of
    from p2pmodel.node.patchbook import read_patch

    entry = read_patch(home, patch)
    if recipe_only:
        typer.echo(recipe_of(entry.patch), nl=False)
        return
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
        f"recipe       {recipe.steps} steps of {recipe.batch * recipe.accumulate} × {recipe.sequence} tokens, "
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
            size(sum(ref.size for ref in e.patch.blobs)),
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
