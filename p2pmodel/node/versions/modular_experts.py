"""The modular experts of a version, for people: how large they are, and where they come from."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from p2pmodel.domain.ids import PatchId, PeerId, VersionId
from p2pmodel.domain.modular import KIND, Expert, is_pool, place_of, slots_of_expert
from p2pmodel.domain.version import Candidate
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import read_change


@dataclass(frozen=True)
class Contribution:
    """A merged patch that holds something of an expert."""

    version: str
    patch: PatchId
    contributor: PeerId
    parts: tuple[str, ...]
    data: tuple[str, ...]


@dataclass(frozen=True)
class ModularExpert:
    """since: the number of the version that brought it; values: in all layers; contributions: oldest first, of patches
    that are on this machine."""

    name: str
    rank: int
    since: str
    layers: int
    values: int
    contributions: tuple[Contribution, ...]


def experts_of(lineage: Lineage, version: VersionId) -> tuple[ModularExpert, ...]:
    """Sorted by name."""
    return tuple(describe(lineage, version, expert) for expert in lineage.experts(version))


def describe(lineage: Lineage, version: VersionId, expert: Expert) -> ModularExpert:
    """expert: one that the version has."""
    pools = [slot for slot in lineage.manifest.slots if is_pool(slot)]
    chain = lineage.chain(version)
    return ModularExpert(
        expert.name,
        expert.rank,
        _since(chain, expert),
        len(pools),
        sum(prod(slot.shape) for slot in slots_of_expert(pools, expert)),
        tuple(_contributions(lineage, chain, expert.name)),
    )


def _since(chain: Sequence[Candidate], expert: Expert) -> str:
    """The oldest of the latest versions that have it without a gap."""
    having = itertools.takewhile(lambda made: expert in made.experts, reversed(chain))
    return str(list(having)[-1].number)


def _contributions(lineage: Lineage, chain: Sequence[Candidate], name: str) -> Iterator[Contribution]:
    for made in chain:
        for patch in made.patches:
            header = lineage.patches.get(patch)
            if header is None or header.kind != KIND or not lineage.home.objects.has(header.adapter.digest):
                continue
            change = read_change(lineage, header.kind, lineage.home.objects.load(header.adapter.digest))
            places = [place for slot in change.values if (place := place_of(slot)) is not None]
            parts = sorted({place.part for place in places if place.expert == name})
            if parts:
                data = tuple(file.name for file in header.provenance.data)
                yield Contribution(str(made.number), patch, header.contributor, tuple(parts), data)
