"""What gossip lets in, and how often."""

import base58
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmodel.domain.announcement import Announcement
from p2pmodel.domain.ids import ModelId
from p2pmodel.gossip.gate import FORWARD_BURST, REPLAY_SECONDS, Gate, refusal, topic_name
from p2pmodel.gossip.limits import PUBLISH_BURST, PUBLISH_RATE, SourceLimits, TokenBucket
from p2pmodel.wire import canonical
from p2pmodel.wire.signing import Key
from tests.support.factories import blob, patch

KEY = Key.generate()
ORIGIN = base58.b58decode(KEY.peer)
MODEL: ModelId = canonical.digest(b"model")
TOPICS = [topic_name(MODEL)]


def announcement(key: Key = KEY, holder: Key = KEY, model: ModelId = MODEL) -> bytes:
    return key.sign("announcement", Announcement(holder.peer, model, "patch", blob()))


@given(st.lists(st.floats(0, 5), min_size=1, max_size=80), st.floats(0.5, 20), st.integers(1, 20))
def test_a_bucket_gives_no_more_than_its_burst_and_its_rate(gaps: list[float], rate: float, burst: int) -> None:
    bucket, now, taken = TokenBucket(rate, burst), 0.0, 0
    for gap in gaps:
        now += gap
        taken += bucket.take(now)
        assert taken <= burst + rate * (now - gaps[0]) + 1e-6


def test_reservations_wait_their_turn() -> None:
    bucket = TokenBucket(5, 20)
    assert [bucket.reserve(0.0) for _ in range(20)] == [0.0] * 20
    assert [bucket.reserve(0.0) for _ in range(3)] == pytest.approx([0.2, 0.4, 0.6])
    assert bucket.reserve(10.0) == 0.0


def test_the_sources_that_were_seen_last_are_remembered() -> None:
    limits = SourceLimits(rate=1, burst=1, capacity=2)
    assert [limits.allow(source, 0) for source in "aba"] == [True, True, False]
    assert limits.allow("c", 0)  # forgets b, which was seen longest ago
    assert [limits.allow(source, 0) for source in "ab"] == [False, True]


def test_an_announcement_for_its_model_is_let_in() -> None:
    gate = Gate()
    assert gate.admit("peer", ORIGIN, TOPICS, 300, 0.0)
    assert gate.accept(ORIGIN, MODEL, announcement(), 0.0)
    assert not gate.refused


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (announcement(model=canonical.digest(b"another")), "model"),
        (announcement(key=Key.generate()), "owner"),
        (announcement()[:-1] + bytes([announcement()[-1] ^ 1]), "signature"),
        (KEY.sign("patch", patch(KEY)), "kind"),
        (b"", "schema"),
        (bytes(4097), "size"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_announcement_for_the_model_is_refused_by_reason(data: bytes, reason: str) -> None:
    gate = Gate()
    assert refusal(MODEL, data) == reason
    assert not gate.accept(ORIGIN, MODEL, data, 0.0)
    assert gate.refused == {reason: 1}


@pytest.mark.parametrize(
    ("origin", "topics", "size", "reason"),
    [
        (ORIGIN, TOPICS, 4097, "size"),
        (ORIGIN, [*TOPICS, "another"], 10, "topics"),
        (ORIGIN, [], 10, "topics"),
        (b"\x12\x20" + bytes(32), TOPICS, 10, "origin"),  # the id of an RSA key: its key would come with the message
        (b"", TOPICS, 10, "origin"),
    ],
    ids=["too large", "two topics", "no topic", "an RSA key", "nobody"],
)
def test_a_message_is_refused_by_its_outside(origin: bytes, topics: list[str], size: int, reason: str) -> None:
    gate = Gate()
    assert not gate.admit("peer", origin, topics, size, 0.0)
    assert gate.refused == {reason: 1}


def test_an_origin_may_send_a_replay_and_then_its_rate() -> None:
    gate, record = Gate(), announcement()
    allowed = int(PUBLISH_BURST + PUBLISH_RATE * REPLAY_SECONDS)
    assert sum(gate.accept(ORIGIN, MODEL, record, 0.0) for _ in range(allowed + 5)) == allowed
    assert gate.refused == {"rate": 5}
    assert sum(gate.accept(ORIGIN, MODEL, record, 1.0) for _ in range(10)) == PUBLISH_RATE
    assert gate.accept(base58.b58decode(Key.generate().peer), MODEL, record, 1.0)


def test_a_forwarder_is_limited_whoever_it_says_the_origins_are() -> None:
    gate = Gate()
    origins = [ORIGIN[:6] + i.to_bytes(32, "big") for i in range(FORWARD_BURST + 7)]
    assert sum(gate.admit("flooder", origin, TOPICS, 10, 0.0) for origin in origins) == FORWARD_BURST
    assert gate.refused == {"forwarder-rate": 7}
    assert gate.admit("another", ORIGIN, TOPICS, 10, 0.0)
