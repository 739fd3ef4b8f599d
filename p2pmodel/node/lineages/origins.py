"""What a branch begins with: the values of that version, and whether they are what its own lineage says."""

from collections.abc import Sequence

from torch import Tensor

from p2pmodel.domain.errors import NotFound, Rejected
from p2pmodel.domain.ids import VersionId, short
from p2pmodel.domain.model import BlobRef, Origin
from p2pmodel.logic.ancestry import Point
from p2pmodel.node.lineages.branches import Family
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import base_ref, version_state


def values_at(family: Family, point: Point, lines: Sequence[Lineage]) -> tuple[str, dict[str, Tensor]]:
    """(number, values of all slots) of a version: of its own lineage, or as a branch that begins with it has them, of
    these lines only: anybody can found a branch, and say what it likes of where it began.

    Raises NotFound; Rejected where two of the lines say otherwise."""
    parent = family.lineages.get(point.model)
    if parent is not None and _has(parent, point.version):
        return str(parent.number(point.version)), version_state(parent, point.version)
    said: dict[tuple[str, BlobRef], Lineage] = {}
    for lineage in lines:
        branch: Lineage | None = lineage
        while branch is not None and (origin := branch.founding.origin) is not None:
            if (origin.model, origin.version) == (point.model, point.version):
                said[origin.number, origin.result] = branch
            branch = family.lineages.get(origin.model)
    if not said:
        raise NotFound(f"The model {short(point.model)} is not known here.", "See: p2pmodel model list")
    if len(said) > 1:
        names = " and ".join(branch.manifest.name for branch in said.values())
        raise Rejected("origin", f"{names} begin with one version, and say different things of its values.")
    ((number, _), branch) = said.popitem()
    return number, version_state(branch, VersionId(branch.model))


def proven_origins(family: Family, lineage: Lineage) -> tuple[Origin, ...]:
    """Of a branch the origin, then its origin's, and so on, as far as a version that is proven here is what it says it
    is. Raises Rejected where such a version has another number or other values."""
    proven: list[Origin] = []
    while (origin := lineage.founding.origin) is not None and origin.model in family.lineages:
        parent = family.lineages[origin.model]
        if not _has(parent, origin.version):
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


def _has(lineage: Lineage, version: VersionId) -> bool:
    return version in (lineage.model, *(known.id for known in lineage.versions))
