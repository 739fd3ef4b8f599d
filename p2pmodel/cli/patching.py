"""`p2pmodel patch`."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from p2pmodel.cli import interchange, options
from p2pmodel.cli.lineages import lineage_of
from p2pmodel.cli.output import emit, printable, size, table
from p2pmodel.domain import modular
from p2pmodel.domain.errors import NotFound, Rejected, UsageError
from p2pmodel.domain.ids import short
from p2pmodel.domain.patch import DataFile, Patch

if TYPE_CHECKING:
    from p2pmodel.node.patches.auditing import Audit

app = typer.Typer(no_args_is_help=True, help="Publish patches, look at them, check them, and take them elsewhere.")
app.command()(interchange.export)
app.command("import")(interchange.import_)


@app.command()
def publish(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A patch file.")],
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """Announce a patch to the swarm, through the node that runs on this home."""
    from p2pmodel.control.client import ControlClient
    from p2pmodel.node.lineages.intake import take_in
    from p2pmodel.node.lineages.lineage import Lineage
    from p2pmodel.store import patchfile
    from p2pmodel.store.home import Home

    folder = Home.open(home)
    with ControlClient.connect(folder.control_socket) as client:
        record = take_in(Lineage(folder, patchfile.read(file).patch.model), file.read_bytes())
        client.publish(record.digest)
    emit({"id": record.digest}, f"patch {short(record.digest)} is announced; follow it with: p2pmodel patch list", json)


@app.command()
def show(
    patch: options.PatchArgument,
    recipe_only: Annotated[
        bool, typer.Option("--recipe", help="Print how it was trained, as TOML for: p2pmodel train --recipe")
    ] = False,
    statement: Annotated[
        bool, typer.Option("--statement", help="Print its provenance as an in-toto statement, signed by this home.")
    ] = False,
    croissant: Annotated[bool, typer.Option("--croissant", help="Print what its data are as Croissant.")] = False,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """What a patch changes, and what it was trained on."""
    from p2pmodel.cli.recipes import recipe_of
    from p2pmodel.node.patches.patchbook import open_patch, read_patch

    if recipe_only + statement + croissant > 1:
        raise UsageError("--recipe, --statement and --croissant are three things to print.", "Ask for one at a time.")
    if statement:
        from p2pmodel.wire.statement import envelope

        opened = open_patch(home, patch)
        typer.echo(envelope(opened.record, opened.lineage.home.key).decode())
        return
    entry = read_patch(home, patch)
    noun = entry.patch
    if recipe_only:
        typer.echo(recipe_of(noun, _expert(home, patch) if noun.kind == modular.KIND else ""), nl=False)
        return
    if croissant:
        from p2pmodel.wire.statement import croissant as described

        emit(described(entry.id, noun), "", as_json=True)
        return
    lines = [
        f"patch        {entry.id}",
        f"kind         {printable(noun.kind)}",
        f"contributor  {noun.contributor}",
        f"model        {entry.model_name} ({short(noun.model)})",
        f"parent       {entry.parent_number} ({short(noun.parent)})",
        f"size         adapter {size(noun.adapter.size)}, Fisher {size(noun.fisher.size)}"
        + (f", control variate {size(noun.control.size)}" if noun.control else ""),
        "loss         not measured"
        if noun.loss_before == noun.loss_after == 0
        else f"loss         {noun.loss_before:.4f} before, {noun.loss_after:.4f} after, in nats per token, "
        "as its contributor says",
        f"licence      {printable(noun.licence) or 'not stated'}",
        f"state        {printable(entry.state)}",
        *_training(noun),
        *(_data("data", file) for file in noun.provenance.data),
        *(_data("held out", file) for file in noun.provenance.validation),
    ]
    emit({"id": entry.id, "state": entry.state, "patch": noun}, "\n".join(lines), json)


def _expert(home: Path | None, patch: str) -> str:
    """Of what is here: a header alone does not say it."""
    from p2pmodel.node.patches.patchbook import open_patch
    from p2pmodel.node.patches.replaying import expert_of

    try:
        return expert_of(open_patch(home, patch))
    except NotFound:
        return ""


def _training(patch: Patch) -> Iterator[str]:
    """How it was trained, a line for each matter."""
    provenance, recipe = patch.provenance, patch.provenance.recipe
    if recipe.steps:
        yield (
            f"recipe       {recipe.steps} steps of {recipe.batch * recipe.accumulate} × {recipe.sequence} tokens, "
            f"{printable(recipe.optimizer)} at {recipe.learning_rate:g}, {printable(recipe.schedule)}, "
            f"{printable(recipe.precision)}, seed {recipe.seed}"
        )
    else:
        yield f"recipe       {printable(recipe.optimizer)}, not trained here"
    if recipe.kind_options:
        yield f"             {', '.join(f'{printable(name)} {value:g}' for name, value in recipe.kind_options)}"
    if recipe.continued or provenance.correction:
        begun = "with the moments of the training before" if recipe.continued else ""
        corrected = "with the contributors' control variates" if provenance.correction else ""
        yield f"             {' and '.join(filter(None, (begun, corrected)))}"
    software = ", ".join(printable(" ".join(pair)) for pair in provenance.software)
    yield f"software     {software}; {provenance.threads} threads"
    if provenance.replayable:
        yield (
            f"checkpoints  {len(provenance.checkpoints)}, every {provenance.checkpoint_every} steps; "
            "do some of it again with: p2pmodel patch audit"
        )
        for at, digest in enumerate(provenance.checkpoints):
            if at in (0, len(provenance.checkpoints) - 1) or digest == patch.checkpoint:
                chosen = " (the patch)" if digest == patch.checkpoint else ""
                yield f"             step {provenance.step_of(at)}  {digest}{chosen}"


def _data(what: str, file: DataFile) -> str:
    licence = printable(file.licence) or "licence not stated"
    examples = f"{file.examples} example{'s'[: file.examples != 1]}"
    return f"{what:<12} {printable(file.name)}, {size(file.size)}, {examples}, {licence}, SHA-256 {file.digest}"


@app.command()
def audit(
    patch: options.PatchArgument,
    data: Annotated[list[Path], typer.Option("--data", help="What it was trained on; may be repeated.", exists=True)],
    segments: Annotated[int, typer.Option("--segments", help="To do again, of those between checkpoints.", min=1)] = 2,
    seed: Annotated[
        int | None, typer.Option("--seed", help="That they are drawn by.", show_default="nobody can know it")
    ] = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option("--checkpoints", help="Folder of states, named by digest.", exists=True, file_okay=False),
    ] = None,
    peers: options.Peers = None,
    swarm_key: options.SwarmKey = None,
    base: options.Base = None,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """Do some of a patch's training again, on its data, and compare; a difference ends with status 6."""
    from p2pmodel.node.lineages.bases import find_base
    from p2pmodel.node.lineages.finding import SwarmFinder
    from p2pmodel.node.patches.auditing import audit as examine
    from p2pmodel.node.patches.evidence import find_in, in_folder, in_home
    from p2pmodel.node.patches.patchbook import open_patch
    from p2pmodel.node.patches.savepoints import MAX_KEPT_BYTES

    opened = open_patch(home, patch)
    folder = opened.lineage.home
    places = [in_folder(checkpoints)] if checkpoints else []
    key = folder.swarm_key(swarm_key)
    with SwarmFinder(folder, peers or (), opened.patch.contributor, MAX_KEPT_BYTES, key) as swarm:
        find = find_in(in_home(folder), *places, swarm.find)
        report = examine(opened, find_base(folder, opened.lineage, base), data, find, segments=segments, seed=seed)
    emit(report, _audited(opened.id, report), json)
    if report.problems:
        raise Rejected("audit", f"Patch {short(opened.id)} is not what it says: {report.problems[0]}")
    if report.gaps:
        raise NotFound(
            f"Patch {short(opened.id)} could not be audited in full: {report.gaps[0]}",
            "Ask the contributor for the states, and name their folder with --checkpoints.",
        )


def _audited(patch: str, report: "Audit") -> str:
    rows = [
        [f"{s.first_step} to {s.last_step}", s.verdict, "-" if s.apart == float("inf") else f"{s.apart:.2g}"]
        for s in report.segments
    ]
    alike = (
        "the same bits are expected" if report.comparable else "other software, threads or processor: closeness counts"
    )
    return "\n".join(
        [
            f"patch {short(patch)}: {len(report.segments)} of {report.of} segments done again, drawn by seed "
            f"{report.seed}; {alike}",
            table("", ["steps", "result", "apart"], rows),
            f"Fisher {report.fisher or 'not checked: its states are not to be had'}",
            f"{report.seconds:.1f} s for {report.steps} of {report.of_steps} steps, "
            f"{report.steps / max(1, report.of_steps):.0%} of the training",
            *(report.problems or report.gaps or ("nothing speaks against what the patch says",)),
        ]
    )


@app.command()
def verify(
    patch: Annotated[
        str | None,
        typer.Argument(metavar="PATCH", help="A patch file, or the id of a known patch.", show_default=False),
    ] = None,
    statement: Annotated[
        Path | None,
        typer.Option(
            "--statement",
            help="What `patch show --statement` printed, instead of a patch.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """Check a patch as every peer does: signature, digests, parent, slots, shapes, values, limits.

    Of a statement: its signatures, and that it says what the contributor signed.
    """
    if (patch is None) == (statement is None):
        raise UsageError("What is verified is a patch, or a statement about one.", "Name a PATCH, or --statement FILE.")
    if statement is not None:
        return _verify_statement(statement, json)
    from p2pmodel.node.patches.patchbook import verify_patch

    assert patch is not None
    entry = verify_patch(home, patch)
    emit(
        {"id": entry.id, "valid": True},
        f"patch {short(entry.id)} is valid: signed by {entry.patch.contributor}, "
        f"on {entry.model_name} {entry.parent_number}",
        json,
    )


def _verify_statement(file: Path, json: bool) -> None:
    from p2pmodel.wire.statement import open_envelope

    patch, noun, signers = open_envelope(file.read_bytes())
    emit(
        {"id": patch, "valid": True, "contributor": noun.contributor, "signers": signers},
        f"the statement says of patch {patch} what {noun.contributor} signed; it is attested by {', '.join(signers)}",
        json,
    )


@app.command("list")
def list_patches(model: options.Model = None, home: options.Home = None, json: options.Json = False) -> None:
    """The patches that this home knows, and what became of them."""
    from p2pmodel.node.patches.patchbook import entries

    known = entries(lineage_of(home, model))
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
