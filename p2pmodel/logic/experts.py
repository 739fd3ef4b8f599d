"""Which peer computes which expert: the one that will have answered first; and which experts nobody hosts."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp

from p2pmodel.domain.experts import ExpertLease, MissingExpert, rate_at
from p2pmodel.domain.ids import PeerId, VersionId

MEMORY = 0.2
"""The weight of the latest observation in what is expected of a peer."""


LOAD_SECONDS = 60.0
"""What an expert was asked this long ago counts a third of what it is asked now."""


@dataclass(frozen=True)
class Loads:
    """How often a host's experts are asked. at: when that was looked at; counted: pairs by expert until then, in all
    layers; rates: pairs in a second and layer, as of lately."""

    at: float
    counted: Mapping[int, int] = field(default_factory=dict)
    rates: Mapping[int, float] = field(default_factory=dict)

    def after(self, counted: Mapping[int, int], layers: int, now: float) -> "Loads":
        """counted: since the start, in `layers` layers together."""
        seconds = now - self.at
        if seconds <= 0:
            return self
        keep = exp(-seconds / LOAD_SECONDS)
        rates = {
            expert: keep * self.rates.get(expert, 0.0)
            + (1 - keep) * (counted.get(expert, 0) - self.counted.get(expert, 0)) / (seconds * layers)
            for expert in self.rates.keys() | counted.keys()
        }
        return Loads(now, counted, rates)


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


def hosts_of(leases: Sequence[ExpertLease], layers: int) -> tuple[int, ...]:
    """By expert, up to the highest that anybody hosts: how many peers do, in the layer where they are fewest, of those
    of the model's `layers` that anybody hosts experts of."""
    by_layer = _by_layer(leases, layers)
    counts = [Counter(e for lease in some for e in lease.experts) for some in by_layer]
    return tuple(min(count[expert] for count in counts) for expert in range(_known(by_layer)))


def asked_of(leases: Sequence[ExpertLease], layers: int) -> tuple[float, ...]:
    """The same of rows a second that they were lately asked for, in the layer where they are most."""
    by_layer = _by_layer(leases, layers)
    sums = [_asked(some) for some in by_layer]
    return tuple(max(rates.get(expert, 0.0) for rates in sums) for expert in range(_known(by_layer)))


def _asked(leases: Sequence[ExpertLease]) -> dict[int, float]:
    rates: dict[int, float] = {}
    for lease in leases:
        for expert, load in zip(lease.experts, lease.loads, strict=False):
            rates[expert] = rates.get(expert, 0.0) + rate_at(load)
    return rates


def _by_layer(leases: Sequence[ExpertLease], layers: int) -> list[list[ExpertLease]]:
    """Those on each layer, but for layers that are like the one before."""
    edges = sorted({edge for lease in leases for edge in (lease.span.start, lease.span.end) if edge < layers})
    there = [[lease for lease in leases if layer in lease.span and not lease.leaving] for layer in edges]
    return [some for some in there if some]


def _known(by_layer: Sequence[Sequence[ExpertLease]]) -> int:
    return max((lease.experts[-1] + 1 for some in by_layer for lease in some), default=0)


def name_missing(found: Sequence[MissingExpert]) -> str:
    """As the subject of a sentence: the first one, and how many more there are."""
    first = f"expert {found[0].expert} of layer {found[0].layer}"
    return first if len(found) == 1 else f"{first} and {len(found) - 1} more"
