"""`p2pmodel model amend`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from p2pmodel.cli import options
from p2pmodel.cli.modelling import warn_of_minority
from p2pmodel.cli.output import emit
from p2pmodel.domain.errors import InvalidInput, UsageError
from p2pmodel.domain.ids import PeerId, short


def amend(
    add: Annotated[list[str] | None, typer.Option("--add-maintainer", help="Peer id; may be repeated.")] = None,
    remove: Annotated[list[str] | None, typer.Option("--remove-maintainer", help="Peer id; may be repeated.")] = None,
    threshold: Annotated[int | None, typer.Option("--threshold", help="How many maintainers have to accept.")] = None,
    exam: Annotated[
        Path | None, typer.Option("--exam", exists=True, file_okay=False, help="Folder of another exam.")
    ] = None,
    min_patches: Annotated[int | None, typer.Option("--min-patches", help="A round closes at that many.")] = None,
    max_patches: Annotated[int | None, typer.Option("--max-patches", help="A round takes no more.")] = None,
    open_seconds: Annotated[float | None, typer.Option("--open-seconds", help="Or after this time.")] = None,
    proposer_seconds: Annotated[
        float | None, typer.Option("--proposer-seconds", help="Until the next maintainer proposes.")
    ] = None,
    verdict_seconds: Annotated[
        float | None, typer.Option("--verdict-seconds", help="For verdicts; enough for people who are asked.")
    ] = None,
    planned_rounds: Annotated[
        int | None,
        typer.Option("--planned-rounds", help="The contributors' learning rate follows one schedule over so many."),
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option("--tolerance", help="How much worse a version may be on any domain.")
    ] = None,
    max_patch_bytes: Annotated[
        str | None, typer.Option("--max-patch-bytes", metavar="SIZE", help="Larger patches are refused, such as 64M.")
    ] = None,
    model: options.Model = None,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """Propose to change who decides, the exam, the schedule or the limits; maintainers approve it one by one.

    It is adopted by as many maintainers as now decide, and where keys or threshold change, by as many as will then. It
    becomes a version of its own, with the values of the head.
    """
    import dataclasses

    from p2pmodel.control.client import ControlClient
    from p2pmodel.engine.exams import Suite
    from p2pmodel.node.lineages.discovery import local_lineage
    from p2pmodel.node.rounds.asides import propose_amendment
    from p2pmodel.store.home import Home

    folder = Home.open(home)
    lineage = local_lineage(folder, model)
    before = lineage.manifest.amendment
    coming, going = {PeerId(peer) for peer in add or ()}, {PeerId(peer) for peer in remove or ()}
    if both := sorted(coming & going):
        raise UsageError(f"{both[0]} is to be added and removed.", "Name it once.")
    if unknown := sorted(going - {*before.maintainers}):
        raise UsageError(f"{unknown[0][:64]} is no maintainer of {lineage.manifest.name}.", "See: p2pmodel model show")
    schedule: dict[str, Any] = {
        "min_patches": min_patches,
        "max_patches": max_patches,
        "open_seconds": open_seconds,
        "proposer_seconds": proposer_seconds,
        "verdict_seconds": verdict_seconds,
        "planned_rounds": planned_rounds,
    }
    limits: dict[str, Any] = {
        "regression_tolerance": tolerance,
        "max_patch_bytes": None if max_patch_bytes is None else options.parse_size(max_patch_bytes),
    }
    suite = None if exam is None else Suite.load(exam)
    if suite is not None and not suite.domains:
        raise InvalidInput(f"The exam in {exam} has no [[domain]]: rounds minimise the loss on held-out text.")
    with ControlClient.connect(folder.control_socket) as client:
        try:
            after = dataclasses.replace(
                before,
                maintainers=tuple(sorted(({*before.maintainers} | coming) - going)),
                threshold=before.threshold if threshold is None else threshold,
                exam=before.exam if suite is None else folder.objects.put(suite.pack()),
                schedule=dataclasses.replace(before.schedule, **{k: v for k, v in schedule.items() if v is not None}),
                limits=dataclasses.replace(before.limits, **{k: v for k, v in limits.items() if v is not None}),
            )
        except ValueError as error:
            raise InvalidInput(f"The Manifest can't be amended so: {error}.") from None
        record, version = propose_amendment(lineage, after)
        client.publish(record)
    changes = before.differences(after)
    warn_of_minority(after.threshold, len(after.maintainers))
    emit(
        {"id": version, "changes": changes},
        "\n".join(
            [
                *changes,
                f"proposed as version {short(version)}; each maintainer: p2pmodel round approve {short(version)}",
            ]
        ),
        json,
    )
