"""Which peer computes which expert: the one that will have answered first; and which experts nobody hosts."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from p2pmodel.domain.experts import ExpertLease, MissingExpert
from p2pmodel.domain.ids import PeerId, VersionId

MEMORY = 0.2
"""The weight of the latest observation in what is expected of a peer."""


@dataclass(frozen=True)
class Offer:
    """What a peer is expected to take: `latency` seconds for anything at all, and `pair_seconds` for each row of each
    expert."""

    experts: frozenset[int]
    latency: float
    pair_seconds: float


def assign(rows: Mapping[int, int], offers: Mapping[PeerId, Offer]) -> dict[PeerId, tuple[int, ...]]:
    """The experts that each peer computes, so that the last answer comes early. rows: how many each expert has; experts
    that nobody offers are in no peer's share.

    Those with the fewest hosts are given away first, and among them the ones with the most rows; each goes to whoever
    would be done with it first, by name where several would. The same arguments give the same shares.
    """
    hosts = {expert: [peer for peer, offer in offers.items() if expert in offer.experts] for expert in rows}
    work: dict[PeerId, float] = {}
    shares: dict[PeerId, list[int]] = {}
    for expert in sorted(rows, key=lambda expert: (len(hosts[expert]), -rows[expert], expert)):
        if not hosts[expert]:
            continue
        done = {
            peer: work.get(peer, offers[peer].latency) + rows[expert] * offers[peer].pair_seconds
            for peer in hosts[expert]
        }
        chosen = min(done, key=lambda peer: (done[peer], peer))
        work[chosen] = done[chosen]
        shares.setdefault(chosen, []).append(expert)
    return {peer: tuple(sorted(share)) for peer, share in shares.items()}


def missing(
    leases: Iterable[ExpertLease], experts: Mapping[int, int], version: VersionId, reachable: Collection[PeerId]
) -> list[MissingExpert]:
    """The experts of the layers, in order, that no reachable peer serves at `version`. experts: layer -> how many."""
    there = [
        lease for lease in leases if not lease.leaving and version in lease.versions and lease.peer in set(reachable)
    ]
    found = []
    for layer, count in sorted(experts.items()):
        held = {expert for lease in there if layer in lease.span for expert in lease.experts}
        found += [MissingExpert(layer, expert) for expert in range(count) if expert not in held]
    return found


def name_missing(found: Sequence[MissingExpert]) -> str:
    """As the subject of a sentence: the first one, and how many more there are."""
    first = f"expert {found[0].expert} of layer {found[0].layer}"
    return first if len(found) == 1 else f"{first} and {len(found) - 1} more"
