"""Who counts as a host: peers that serve the head, or have not had the time to."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from p2pmodel.domain.experts import ExpertLease, load_of
from p2pmodel.domain.ids import VersionId
from p2pmodel.domain.swarm import Lease, Span
from p2pmodel.logic.expert_placement import ExpertResidence, ExpertSupply, ExpertSwap, choose_experts, look, still_good
from p2pmodel.logic.keeping_up import ADOPTING_SECONDS, Heads
from p2pmodel.logic.placement import Supply, choose_span
from p2pmodel.node.lineages.heads import first_heads, next_heads
from p2pmodel.wire import canonical
from p2pmodel.wire.signing import Key
from tests.support.lineages import begin, grow

MODEL = canonical.digest(b"model")
ONE, TWO, THREE = (VersionId(canonical.digest(text)) for text in (b"one", b"two", b"three"))
PEERS = tuple(Key(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)).peer for number in range(6))
LAYERS = (0, 1)


def lease(number: int, experts: Sequence[int], *versions: VersionId, load: float = 0.0) -> ExpertLease:
    loads = (load_of(load),) * len(experts)
    return ExpertLease(PEERS[number], MODEL, Span(0, 2), tuple(experts), "fp32", versions, 1e-3, 0, False, 1e9, loads)


def stage(number: int, span: Span, *versions: VersionId) -> Lease:
    return Lease(PEERS[number], MODEL, span, "fp32", versions, 1e-3, 0, False, 1e9)


def test_whoever_serves_the_version_before_counts_for_a_while() -> None:
    heads = Heads.begin(ONE, 0.0).after(TWO, 5.0)
    old, new = lease(0, (0,), ONE), lease(1, (0,), TWO, ONE)
    late = heads.after(TWO, 5.0 + ADOPTING_SECONDS)
    assert heads.keeps_up(old)
    assert heads.keeps_up(new)
    assert heads.after(TWO, 4.9 + ADOPTING_SECONDS).keeps_up(old)
    assert not late.keeps_up(old)
    assert late.keeps_up(new)
    assert late.hosts([old, new], own=PEERS[0]) == [old, new]
    assert late.hosts([old, new], own=PEERS[1]) == [new]


def test_a_node_that_is_late_itself_counts_who_is_ahead() -> None:
    heads = Heads.begin(ONE, 0.0).after(ONE, 1.0, ahead=(TWO, THREE))
    assert heads.keeps_up(lease(0, (0,), THREE))
    assert not heads.keeps_up(lease(0, (0,), VersionId(MODEL)))


@given(st.lists(st.floats(0.0, 2 * ADOPTING_SECONDS), max_size=12), st.integers(0, 12))
def test_a_version_counts_until_a_later_one_is_settled(pauses: list[float], served: int) -> None:
    """A host stays at the version that was served-th; versions come after pauses."""
    names = [VersionId(canonical.digest(str(number).encode())) for number in range(len(pauses) + 1)]
    heads, now, came = Heads.begin(names[0], 0.0), 0.0, [0.0]
    for name, pause in zip(names[1:], pauses, strict=True):
        now += pause
        came.append(now)
        heads = heads.after(name, now)
    served = min(served, len(pauses))
    settled = max((n for n, since in enumerate(came) if since <= now - ADOPTING_SECONDS), default=0)
    assert heads.keeps_up(lease(0, (0,), names[served])) == (served >= settled)
    assert heads.heads[-1][0] == names[-1]


SETTLED = Heads.begin(ONE, 0.0).after(TWO, 0.0).after(TWO, 10 * ADOPTING_SECONDS)


def test_an_expert_is_not_given_up_for_a_keeper_that_does_not_serve_the_head() -> None:
    """Expert 2 is hot, and the node's expert 0 has another host, which is stuck."""
    home = ExpertResidence(PEERS[0], (0,), since=-1e6, hot_since=-1e6)
    hot = [lease(1, (2,), TWO, load=200.0), lease(2, (1,), TWO, load=1.0), lease(0, (0,), TWO)]
    stuck, well = lease(3, (0,), ONE), lease(3, (0,), TWO, ONE)
    swap = ExpertSwap((2,), (0,), "it is hot")
    assert look(home, [*hot, well], LAYERS, 3, 1e6, SETTLED).swap == replace(
        swap, reason="expert 2 is asked most for its 1 host"
    )
    assert still_good(home, swap, [*hot, well], LAYERS, 3, SETTLED)
    assert look(home, [*hot, stuck], LAYERS, 3, 1e6, SETTLED).swap is None
    assert not still_good(home, swap, [*hot, stuck], LAYERS, 3, SETTLED)


def test_an_expert_whose_only_host_is_stuck_is_taken_and_its_demand_counts() -> None:
    there = [lease(1, (0,), TWO), lease(2, (0,), TWO), lease(3, (1,), ONE, load=50.0)]
    assert choose_experts(there, LAYERS, 2, 1, heads=SETTLED) == ((1,), "expert 1 is served by nobody")
    home = ExpertResidence(PEERS[2], (0,), since=-1e6, empty_since=-1e6)
    swap = look(home, there, LAYERS, 2, 1e6, SETTLED).swap
    assert swap is not None
    assert (swap.coming, swap.going) == ((1,), (0,))
    assert still_good(home, swap, there, LAYERS, 2, SETTLED)
    assert look(home, there, LAYERS, 2, 1e6).swap is None
    supply = ExpertSupply(there, LAYERS, 2, without={PEERS[3]})
    assert supply.demand[1] == pytest.approx(50.0, rel=0.1)


def test_layers_whose_only_host_is_stuck_are_a_hole(tmp_path: Path) -> None:
    lineage = begin(tmp_path / "home")
    lineage.home.refs.set(f"models/{lineage.model}/head", lineage.head)
    one, two = grow(lineage, 2)
    lineage.home.refs.set(f"models/{lineage.model}/head", two)
    heads = first_heads(lineage)
    there = [stage(1, Span(0, 3), two, one), stage(2, Span(3, 6), one)]
    assert Supply(heads.hosts(there, PEERS[0]), 6).holes == ()
    assert heads.heads[0][0] == one
    settled = Heads(((two, 0.0),))
    assert next_heads(settled, lineage) == settled
    assert Supply(settled.hosts(there, PEERS[0]), 6).holes == (Span(3, 6),)
    assert choose_span(settled.hosts(there, PEERS[0]), 6, 3)[0] == Span(3, 6)
    lineage.home.refs.set(f"models/{lineage.model}/head", one)
    behind = first_heads(lineage)
    assert behind.ahead == (two,)
    assert Supply(behind.hosts([stage(1, Span(0, 6), two)], PEERS[0]), 6).holes == ()
