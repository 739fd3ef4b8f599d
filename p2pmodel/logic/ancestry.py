"""Where lineages over one base have parted: a branch is a lineage of its own that begins with another one's version.

The line of a version leads from it back to the base of its lineage. A branch's base is the version that it began with,
as far as values go, so its line goes on there, in the other lineage, where that is known. What two lines have in common
first is where they parted; lineages that were founded apart, on the same files, have parted at the neutral base.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from p2pmodel.domain.ids import Digest, ModelId, PatchId, VersionId
from p2pmodel.domain.model import Manifest
from p2pmodel.domain.version import Candidate, Version


@dataclass(frozen=True)
class Strand:
    """What is known of a lineage. manifest: its first; versions: the chain after the base."""

    manifest: Manifest
    versions: tuple[Version, ...]


Strands = Mapping[ModelId, Strand]


@dataclass(frozen=True)
class Point:
    """A version, by the lineage that it is of; the base of a branch is the version that it began with."""

    model: ModelId
    version: VersionId


@dataclass(frozen=True)
class Parting:
    """at: the last version that two lines have in common, on the line of the first; ahead: the versions of the first
    after it, behind: those of the second, each the oldest first."""

    at: Point
    ahead: tuple[Candidate, ...]
    behind: tuple[Candidate, ...]


def line(strands: Strands, point: Point) -> Iterator[tuple[Point, Candidate | None]]:
    """From a version back, as far as its past is known: each point, with what made it. None: of the base of a lineage
    that is no branch, and of a version of a lineage that is not known."""
    while True:
        strand = strands.get(point.model)
        if strand is None:
            yield point, None
            return
        made = {version.id: version.candidate for version in strand.versions}
        while point.version in made:
            candidate = made[point.version]
            yield point, candidate
            point = Point(point.model, candidate.parent)
        origin = strand.manifest.origin
        if point.version != point.model or origin is None:
            yield point, None
            return
        point = Point(origin.model, origin.version)


def part(strands: Strands, first: Point, second: Point) -> Parting | None:
    """None where the lines have nothing in common, as far as they are known."""
    mine, others = list(line(strands, first)), list(line(strands, second))
    places = {point: place for place, (point, _) in enumerate(others)}
    for place, (point, _) in enumerate(mine):
        if point in places:
            return Parting(point, _made(mine[:place]), _made(others[: places[point]]))
    roots = [ends[-1][0] for ends in (mine, others)]
    bases = [strands[root.model].manifest for root in roots if _is_root(strands, root)]
    if len(bases) == 2 and bases[0].files == bases[1].files:
        return Parting(roots[0], _made(mine), _made(others))
    return None


def merged(strands: Strands, point: Point) -> frozenset[PatchId]:
    """The patches that a version has come of, as far back as its past is known: a version that restores an older one
    has come of that one's."""
    made = _made(list(line(strands, point)))
    held: frozenset[PatchId] = frozenset()
    by_values: dict[Digest, frozenset[PatchId]] = {}
    for candidate in made:
        if candidate.restores:
            # What no version before it has are the values at the line's beginning.
            held = by_values.get(candidate.result.digest, frozenset())
        else:
            held |= frozenset(candidate.patches)
        by_values.setdefault(candidate.result.digest, held)
    return held


def _is_root(strands: Strands, point: Point) -> bool:
    """Whether it is the neutral base."""
    strand = strands.get(point.model)
    return strand is not None and point.version == point.model and strand.manifest.origin is None


def _made(steps: Sequence[tuple[Point, Candidate | None]]) -> tuple[Candidate, ...]:
    return tuple(candidate for _, candidate in reversed(steps) if candidate is not None)
