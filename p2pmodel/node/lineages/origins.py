"""What a branch begins with: the values of that version, and whether they are what its own lineage says."""

from torch import Tensor

from p2pmodel.domain.errors import NotFound, Rejected
from p2pmodel.domain.ids import VersionId, short
from p2pmodel.domain.model import Origin
from p2pmodel.logic.ancestry import Point
from p2pmodel.node.lineages.branches import Family
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import base_ref, version_state


def values_at(family: Family, point: Point) -> tuple[str, dict[str, Tensor]]:
    """(number, values of all slots) of a version: of its own lineage, or as a branch that begins with it has them.
    Raises NotFound."""
    for branch in family.lineages.values():
        origin = branch.founding.origin
        if origin is not None and (origin.model, origin.version) == (point.model, point.version):
            return origin.number, version_state(branch, VersionId(branch.model))
    if point.model not in family.lineages:
        raise NotFound(f"The model {short(point.model)} is not known here.", "See: p2pmodel model list")
    lineage = family.lineages[point.model]
    return str(lineage.number(point.version)), version_state(lineage, point.version)


def proven_origins(family: Family, lineage: Lineage) -> tuple[Origin, ...]:
    """Of a branch the origin, then its origin's, and so on, as far as a version that is proven here is what it says it
    is. Raises Rejected where such a version has another number or other values."""
    proven: list[Origin] = []
    while (origin := lineage.founding.origin) is not None and origin.model in family.lineages:
        parent = family.lineages[origin.model]
        if origin.version not in (parent.model, *(version.id for version in parent.versions)):
            break
        result = parent.result(origin.version) or base_ref(parent.founding)
        if (str(parent.number(origin.version)), result) != (origin.number, origin.result):
            raise Rejected(
                "origin",
                f"{lineage.manifest.name} says that it begins with {family.describe(origin)}, which has another number "
                "or other values.",
            )
        proven.append(origin)
        lineage = parent
    return tuple(proven)
