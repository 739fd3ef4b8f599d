"""`p2pmodel model`."""

from pathlib import Path
from typing import Annotated

import typer

from p2pmodel.cli import options
from p2pmodel.cli.lineages import lineage_of
from p2pmodel.cli.merging import parse_strategy
from p2pmodel.cli.output import emit, size, table
from p2pmodel.domain.ids import PeerId, short

app = typer.Typer(no_args_is_help=True, help="Begin a model lineage, and look at the known ones.")


@app.command()
def create(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="Folder of a checkpoint in the Hugging Face format, or a hub id; `starter` is the one that ships."
        ),
    ],
    name: Annotated[str, typer.Option("--name")],
    maintainer: Annotated[
        list[str] | None,
        typer.Option("--maintainer", help="Peer id of a maintainer; may be repeated.", show_default="this home's key"),
    ] = None,
    threshold: Annotated[
        int | None,
        typer.Option(
            "--threshold", help="How many maintainers have to accept a version.", show_default="more than half"
        ),
    ] = None,
    exam: Annotated[
        Path | None,
        typer.Option(
            "--exam", exists=True, file_okay=False, help="Folder of the exam suite.", show_default="the starter's"
        ),
    ] = None,
    licence: Annotated[str, typer.Option("--licence", help="SPDX licence of the model.")] = "",
    min_patches: Annotated[
        int, typer.Option("--min-patches", help="A round closes when that many patches are there.")
    ] = 3,
    open_seconds: Annotated[
        float, typer.Option("--open-seconds", help="Or after this time, with one patch at least.")
    ] = 3600.0,
    max_patches: Annotated[int, typer.Option("--max-patches", help="A round takes no more.")] = 1000,
    proposer_seconds: Annotated[
        float, typer.Option("--proposer-seconds", help="Until the next maintainer proposes.")
    ] = 120.0,
    verdict_seconds: Annotated[
        float, typer.Option("--verdict-seconds", help="For verdicts; enough for people who are asked.")
    ] = 600.0,
    planned_rounds: Annotated[
        int, typer.Option("--planned-rounds", help="The contributors' learning rate follows one schedule over so many.")
    ] = 0,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            "--kind",
            help="Kind of patches that it takes: ia3, fish, lora, dense or expert; may be repeated.",
            show_default="ia3",
        ),
    ] = None,
    strategy: Annotated[
        str,
        typer.Option(
            "--strategy", metavar="NAME[:KEY=VALUE,…]", help="How patches are merged; such as fisher or ties."
        ),
    ] = "fisher",
    tolerance: Annotated[
        float,
        typer.Option("--tolerance", help="How much worse a version may be on any domain of the exam (0.005 is 0.5 %)."),
    ] = 0.005,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """Make, sign and store the Manifest of a new lineage."""
    from p2pmodel import starter
    from p2pmodel.domain.errors import InvalidInput
    from p2pmodel.domain.model import Limits, Schedule
    from p2pmodel.node.lineages import founding, hub
    from p2pmodel.store.home import Home

    folder, merge = Home.open(home), parse_strategy(strategy)
    local = starter.MODEL if checkpoint == starter.NAME and not Path(checkpoint).is_dir() else Path(checkpoint)
    source = None if local.is_dir() else hub.Source.parse(checkpoint)
    if source is None and not local.is_dir():
        raise InvalidInput(f"{checkpoint!r} is neither a folder here nor a hub id such as org/name.")
    try:
        limits = Limits(regression_tolerance=tolerance)
        schedule = Schedule(min_patches, max_patches, open_seconds, proposer_seconds, verdict_seconds, planned_rounds)
    except ValueError as error:
        raise InvalidInput(f"The Manifest can't be made: {error}.") from None
    maintainers = tuple(PeerId(m) for m in maintainer or [folder.key.peer])
    threshold = len(maintainers) // 2 + 1 if threshold is None else threshold
    kinds = tuple(options.versioned(k) for k in kind or ["ia3"])
    decided = founding.Founding(
        name,
        maintainers,
        threshold,
        exam or starter.EXAM,
        licence=licence,
        merge=merge,
        schedule=schedule,
        limits=limits,
        kinds=kinds,
    )
    lineage = (
        founding.found_from_hub(folder, hub.list_files(source), decided)
        if source
        else founding.found(folder, local, decided)
    )
    warn_of_minority(threshold, len(maintainers))
    emit(
        {"id": lineage.model, "name": name, "maintainers": maintainers, "threshold": threshold},
        f"model {lineage.model}\n{name}: {len(lineage.manifest.slots)} slots in {lineage.manifest.layers} layers, "
        f"{threshold} of {len(maintainers)} maintainers adopt a version\n"
        f"host it with: p2pmodel join --model {short(lineage.model)}",
        json,
    )


def warn_of_minority(threshold: int, maintainers: int) -> None:
    if threshold <= maintainers // 2:
        typer.echo(
            f"p2pmodel: {threshold} of {maintainers} is not more than half: two versions of one round could both be "
            "adopted.",
            err=True,
        )


@app.command()
def show(
    model: Annotated[str | None, typer.Argument(help="Name, id, or folder.", show_default="the starter model")] = None,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """The Manifest: what a model is, and who decides."""
    from p2pmodel.node.lineages.branches import Family

    lineage = lineage_of(home, model)
    m = lineage.manifest
    weights = sum(f.blob.size for f in m.files if f.name.endswith(".safetensors"))
    lines = [
        f"model        {lineage.model}",
        f"name         {m.name}",
        f"head         {lineage.number(lineage.head)} ({short(lineage.head)})",
        f"base         {m.architecture}, {m.layers} layers, {size(weights)} of weights"
        f"{', from ' + m.source if m.source else ''}",
        *([f"begins with  {Family(lineage.home).describe(m.origin)}"] if m.origin else []),
        f"patches      {', '.join(m.kinds)}: {len(m.slots)} slots",
        f"merge        {m.merge.strategy} {dict(m.merge.parameters) or ''}".rstrip(),
        f"rounds       close at {m.schedule.min_patches} patches, or after {m.schedule.open_seconds:.0f} s with one; "
        f"{m.schedule.max_patches} at most",
        f"             {m.schedule.proposer_seconds:.0f} s for each proposer, "
        f"{m.schedule.verdict_seconds:.0f} s for verdicts",
        *([f"planned      {m.schedule.planned_rounds} rounds"] if m.schedule.planned_rounds else []),
        f"tolerance    {m.limits.regression_tolerance:.2%} on any domain of the exam",
        f"limits       {size(m.limits.max_patch_bytes)} a patch",
        f"exam         {short(m.exam.digest)}, {size(m.exam.size)}",
        f"licence      {m.licence or 'not stated'}",
        f"maintainers  {m.threshold} of {len(m.maintainers)}:",
        *(f"             {k}" for k in m.maintainers),
    ]
    emit({"id": lineage.model, "head": lineage.head, "manifest": m}, "\n".join(lines), json)


@app.command("list")
def list_models(home: options.Home = None, json: options.Json = False) -> None:
    """The lineages that this home knows."""
    from p2pmodel.node.lineages.lineage import known_lineages
    from p2pmodel.store.home import Home

    known = known_lineages(Home.open(home))
    rows = [
        [x.manifest.name, short(x.model), str(x.number(x.head)), x.manifest.architecture, str(x.manifest.layers)]
        for x in known
    ]
    emit(
        [{"name": x.manifest.name, "id": x.model, "head": str(x.number(x.head))} for x in known],
        table("", ["name", "id", "head", "architecture", "layers"], rows)
        if rows
        else "No models are known here; begin one with: p2pmodel join",
        json,
    )
