"""Which peer computes which expert, and which experts nobody hosts."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmodel.cli.joining import parse_experts
from p2pmodel.domain.errors import Rejected, UsageError
from p2pmodel.domain.experts import MAX_EXPERTS, MAX_LOAD, MAX_LOADS, MAX_SWAPPED, ExpertLease, check_experts, describe
from p2pmodel.domain.ids import PeerId
from p2pmodel.domain.swarm import Span
from p2pmodel.logic.experts import LOAD_SECONDS, Loads, Offer, assign, missing, name_missing
from p2pmodel.wire import canonical, records
from p2pmodel.wire.signing import Key

MODEL = canonical.digest(b"model")
OTHER = canonical.digest(b"other")
BOTH = Span(0, 2)

offers = st.dictionaries(
    st.sampled_from([PeerId(name) for name in "abcde"]),
    st.builds(Offer, st.frozensets(st.integers(0, 7), min_size=1), st.floats(0.0, 1.0), st.floats(1e-6, 0.1)),
)
needs = st.dictionaries(st.integers(0, 7), st.integers(1, 100), min_size=1)


@given(needs, offers)
def test_every_expert_goes_to_one_of_its_hosts(rows: dict[int, int], peers: dict[PeerId, Offer]) -> None:
    shares = assign(rows, peers)
    given_away = [expert for share in shares.values() for expert in share]
    offered = {expert for offer in peers.values() for expert in offer.experts}
    assert sorted(given_away) == sorted(offered & rows.keys())
    for peer, share in shares.items():
        assert share
        assert peers[peer].experts.issuperset(share)
        assert list(share) == sorted(share)


@given(needs, offers)
def test_the_order_of_peers_does_not_matter(rows: dict[int, int], peers: dict[PeerId, Offer]) -> None:
    assert assign(rows, peers) == assign(dict(reversed(rows.items())), dict(reversed(peers.items())))


def test_the_one_that_will_be_done_first_is_asked() -> None:
    every = frozenset(range(4))
    near, far = Offer(every, 0.001, 0.001), Offer(every, 0.050, 0.001)
    assert assign({0: 1, 1: 1}, {PeerId("near"): near, PeerId("far"): far}) == {PeerId("near"): (0, 1)}
    shares = assign({0: 100, 1: 100}, {PeerId("near"): near, PeerId("far"): far})
    assert shares == {PeerId("near"): (0,), PeerId("far"): (1,)}


@given(st.floats(0.5, 20.0))
def test_how_often_an_expert_is_asked_is_a_mean_that_forgets(step: float) -> None:
    loads, now = Loads(0.0), 0.0
    while now < 6 * LOAD_SECONDS:
        now += step
        loads = loads.after({3: int(now * 40), 5: 12}, 4, now)
    assert loads.rates[3] == pytest.approx(10.0, rel=0.05)
    assert loads.rates[5] < 0.1
    assert loads.after({3: 0}, 4, now) is loads
    still = loads.after(loads.counted, 4, now + LOAD_SECONDS)
    assert still.rates[3] == pytest.approx(loads.rates[3] / math.e)


def lease(key: Key, experts: tuple[int, ...], span: Span = BOTH, leaving: bool = False) -> ExpertLease:
    return ExpertLease(key.peer, MODEL, span, experts, "fp32", (MODEL,), 1e-4, 0, leaving, 1e9)


def test_what_nobody_hosts_is_found() -> None:
    one, two, three = (Key.generate() for _ in range(3))
    leases = [lease(one, (0, 1)), lease(two, (2, 3), Span(0, 1)), lease(three, (2, 3), leaving=True)]
    there = [one.peer, two.peer, three.peer]
    found = missing(leases, {0: 4, 1: 4}, MODEL, there)
    assert [(x.layer, x.expert) for x in found] == [(1, 2), (1, 3)]
    assert name_missing(found) == "expert 2 of layer 1 and 1 more"
    assert name_missing(found[:1]) == "expert 2 of layer 1"
    assert len(missing(leases, {0: 4, 1: 4}, MODEL, [two.peer])) == 6
    assert len(missing(leases, {0: 4, 1: 4}, OTHER, there)) == 8


def test_a_lease_of_experts_is_its_owners() -> None:
    key, other = Key.generate(), Key.generate()
    noun = lease(key, tuple(range(MAX_EXPERTS)))
    record = key.sign("experts", noun)
    assert records.open_expert_lease(record) == noun
    assert len(record) < records.MAX_DHT_BYTES
    with pytest.raises(Rejected, match="speaks for"):
        records.open_expert_lease(other.sign("experts", noun))


@pytest.mark.parametrize("held", [MAX_LOADS, MAX_EXPERTS - MAX_SWAPPED])
def test_the_largest_lease_fits(held: int) -> None:
    key, versions = Key.generate(), tuple(canonical.digest(bytes([n])) for n in range(16))
    experts = tuple(range(MAX_EXPERTS - held, MAX_EXPERTS))
    noun = replace(
        lease(key, experts),
        versions=versions,
        loads=(MAX_LOAD,) * held if held <= MAX_LOADS else (),
        coming=tuple(range(MAX_SWAPPED)),
        going=experts[-MAX_SWAPPED:],
    )
    record = key.sign("experts", noun)
    assert records.open_expert_lease(record) == noun
    assert len(record) <= records.MAX_DHT_BYTES


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("loads", (1,)),
        ("loads", (1, MAX_LOAD + 1)),
        ("loads", (-1, 0)),
        ("coming", (1,)),
        ("going", (2,)),
        ("coming", (4, 3)),
        ("coming", tuple(range(2, 3 + MAX_SWAPPED))),
    ],
)
def test_what_no_lease_of_experts_says(field: str, value: tuple[int, ...]) -> None:
    said: dict[str, Any] = {field: value}
    with pytest.raises(ValueError, match="expert"):
        replace(lease(Key.generate(), (0, 1)), **said)


@pytest.mark.parametrize("experts", [(), (1, 0), (2, 2), (-1,), (MAX_EXPERTS,)])
def test_experts_are_sorted_unique_and_in_range(experts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="experts"):
        check_experts(experts)


@given(st.frozensets(st.integers(0, MAX_EXPERTS - 1), min_size=1))
def test_what_is_described_can_be_read_again(experts: frozenset[int]) -> None:
    assert parse_experts(describe(sorted(experts)).replace(" ", "")) == tuple(sorted(experts))


def test_experts_on_the_command_line() -> None:
    assert parse_experts("none") == ()
    assert parse_experts("4-7") == (4, 5, 6, 7)
    assert parse_experts("5-6,0,2,2") == (0, 2, 5, 6)
    for text in ("", "7-4", "a", "1-2-3", "-1", f"0-{10**9}", str(MAX_EXPERTS)):
        with pytest.raises(UsageError):
            parse_experts(text)
