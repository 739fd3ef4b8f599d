"""`p2pmodel quickstart`: the main job, with real processes on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from p2pmodel.cli import options
from p2pmodel.cli.output import emit


def quickstart(
    keep: Annotated[bool, typer.Option("--keep", help="Leave the swarm running at the end.")] = False,
    rounds: Annotated[int, typer.Option("--rounds", min=1, max=20)] = 2,
    hosts: Annotated[int, typer.Option("--hosts", help="Nodes that share the layers between them.", min=2, max=6)] = 3,
    contributors: Annotated[int, typer.Option("--contributors", min=1, max=5)] = 3,
    maintainers: Annotated[int, typer.Option("--maintainers", min=1, max=5)] = 1,
    prompt: Annotated[str, typer.Option("--prompt")] = "async def fetch(self, reader, timeout=None):\n    ",
    folder: Annotated[
        Path | None,
        typer.Option(
            "--folder", help="Where the nodes' homes and logs go.", show_default="a temporary folder", file_okay=False
        ),
    ] = None,
    swarm_key: options.SwarmKey = None,
    json: options.Json = False,
) -> None:
    """See it all work, on this machine, in a few minutes: host, answer, train, gossip, merge, adopt, answer again."""
    from p2pmodel.cli.rehearsal import Plan, rehearse
    from p2pmodel.cli.rehearsal_report import report_text

    plan = Plan(
        hosts=hosts,
        contributors=contributors,
        maintainers=maintainers,
        rounds=rounds,
        prompt=prompt.replace("\\n", "\n"),
        keep=keep,
        folder=folder,
        swarm_key=swarm_key,
    )
    report = rehearse(plan, quiet=json)
    emit(report, report_text(report), json)
