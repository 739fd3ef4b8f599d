"""`p2pmodel gc`."""

from typing import Annotated

import typer

from p2pmodel.cli import options
from p2pmodel.cli.output import emit, size

KEEP_DAYS = 30.0


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; remove nothing.")] = False,
    keep_days: Annotated[
        float, typer.Option("--keep-days", help="What came later stays, whether anything needs it or not.")
    ] = KEEP_DAYS,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """Remove what no version needs: patches that were left out, candidates that nobody adopted, loose ends."""
    from p2pmodel.node.lineages.retention import collect_garbage
    from p2pmodel.store.home import Home

    done = collect_garbage(Home.open(home), keep_days, dry_run=dry_run)
    would = "would go" if dry_run else "are gone"
    emit(
        done,
        f"{done.objects} objects ({size(done.bytes)}) {would}, {done.kept} ({size(done.kept_bytes)}) stay, of which "
        f"{done.young} only because they came within {keep_days:g} days",
        json,
    )
