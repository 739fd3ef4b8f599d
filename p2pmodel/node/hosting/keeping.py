"""Which versions of layers, or of experts, a host keeps, and whether others fit into its memory beside them."""

from collections.abc import Callable

from p2pmodel.domain.ids import VersionId
from p2pmodel.engine.versions import State, VersionTable
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import version_state
from p2pmodel.node.machine.device import Device, free_bytes

KEPT_VERSIONS = 2
"""The head and what came before it, for the sessions that began there."""
SPARE_MEMORY = 1.2
"""How many times the size of what is to be loaded has to be free."""


def adopt(
    table: VersionTable, lineage: Lineage, version: VersionId, own: Callable[[State], State] = lambda state: state
) -> None:
    """Puts `version` into the table, and drops those that nobody is going to begin with. own: what is hosted of a
    version's state."""
    table.put(version, {} if lineage.result(version) is None else own(version_state(lineage, version)))
    for old in table.versions[: -KEPT_VERSIONS - 1]:
        if old != lineage.model:
            table.drop(old)


def has_room(device: Device, size: float) -> bool:
    """Whether as many bytes of weights can be loaded beside those that are served."""
    return free_bytes(device) > SPARE_MEMORY * size
