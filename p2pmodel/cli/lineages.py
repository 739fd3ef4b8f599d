"""The lineage that a command is about."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from p2pmodel.node.lineages.lineage import Lineage


def lineage_of(home: Path | None, model: str | None) -> "Lineage":
    """Of this home, by the options that name them. Raises NotFound."""
    from p2pmodel.node.lineages.discovery import local_lineage
    from p2pmodel.store.home import Home

    return local_lineage(Home.open(home), model)
