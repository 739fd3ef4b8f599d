"""Frames cut from a byte stream, and what opens and ends a session: whatever comes, in whatever pieces."""

import contextlib
import dataclasses
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmodel.domain import errors
from p2pmodel.domain.errors import Busy, PeerFailed, Rejected
from p2pmodel.domain.swarm import Hop, Route, SessionRequest, Span
from p2pmodel.swarm.framing import LAZY_BYTES, Frame, FrameReader, Outbox
from p2pmodel.swarm.opening import CHAIN, MAX_HOPS, MAX_TEXT, SINK, Failure, Opening
from p2pmodel.wire import canonical, frames
from p2pmodel.wire.frames import Kind
from p2pmodel.wire.signing import Key
from tests.support.factories import blob

A, B, C, CLIENT = (Key.generate().peer for _ in range(4))
REQUEST = SessionRequest("0123456789abcdef" * 2, blob().digest, blob().digest, "fp32", Span(0, 4), 128)
OPENING = Opening(REQUEST, (Hop(B, Span(4, 6)), Hop(C, Span(6, 9))), CLIENT)
ROUTE = Route((Hop(A, Span(0, 4)), *OPENING.hops))

messages = st.lists(st.tuples(st.binary(max_size=40), st.binary(max_size=300), st.integers(0, 2**32 - 1)), max_size=8)


def cut(raw: bytes, sizes: list[int]) -> list[Frame]:
    """What a reader makes of `raw` that arrives in pieces of these sizes, over and over."""
    ours, theirs = socket.socketpair()
    reader, done, scratch = FrameReader(), [], memoryview(bytearray(64))
    with ours, theirs:
        theirs.setblocking(False)
        at = turn = 0
        while at < len(raw):
            at += ours.send(raw[at : at + sizes[turn % len(sizes)]])
            turn += 1
            with contextlib.suppress(BlockingIOError):
                while True:
                    done += reader.read(theirs, scratch)
    assert reader.received == len(raw)
    return done


@given(messages, st.lists(st.integers(1, 200), min_size=1, max_size=5))
def test_frames_arrive_whole_in_any_pieces(sent: list[tuple[bytes, bytes, int]], sizes: list[int]) -> None:
    raw = b"".join(frames.pack(Kind.DATA, meta, len(body), position, 1) + body for meta, body, position in sent)
    arrived = cut(raw, sizes)
    assert [(frame.meta, bytes(frame.body), frame.position) for frame in arrived] == sent
    for frame in arrived:
        memoryview(frame.body)[:] = bytes(len(frame.body))  # writable, and nobody else's


def test_a_large_body_lies_in_pages_of_its_own() -> None:
    body = bytes(range(256)) * (LAZY_BYTES // 256 + 1)
    (frame,) = cut(frames.pack(Kind.DATA, b"m", len(body)) + body, [50_000])
    assert bytes(frame.body) == body
    assert not memoryview(frame.body).readonly


@given(st.binary(min_size=16, max_size=200))
def test_random_bytes_are_frames_or_refused(raw: bytes) -> None:
    with contextlib.suppress(Rejected):
        cut(raw, [7])


def test_only_data_has_a_body() -> None:
    with pytest.raises(Rejected):
        cut(frames.HEADER.pack(Kind.ERROR, 0, 0, 5, 0, 0), [100])


def test_a_body_that_is_larger_than_the_reader_takes_is_refused_by_its_header() -> None:
    ours, theirs = socket.socketpair()
    reader, scratch = FrameReader(10), memoryview(bytearray(64))
    with ours, theirs:
        ours.send(frames.pack(Kind.DATA, body_length=10) + bytes(10))
        assert len(reader.read(theirs, scratch)) == 1
        ours.send(frames.pack(Kind.DATA, body_length=11))
        with pytest.raises(Rejected):
            reader.read(theirs, scratch)


def test_what_does_not_fit_into_a_frame_is_not_sent() -> None:
    outbox = Outbox()
    with pytest.raises(Rejected):
        outbox.put_data(b"", 0, 1, bytes(frames.MAX_META_BYTES + 1))
    with pytest.raises(TypeError):
        outbox.put_data(memoryview(bytes(10))[::2], 0, 1, b"")


def test_an_outbox_never_blocks_and_forgets_what_nobody_takes() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    outbox = Outbox()
    body = bytes(4 << 20)
    outbox.put_data(body, 0, 1, b"")
    outbox.flush(ours)
    total = frames.HEADER.size + len(body)
    assert 0 < outbox.sent < total
    assert outbox.size == total - outbox.sent
    theirs.close()
    outbox.flush(ours)
    assert outbox.size == 0
    ours.close()


def test_an_opening_goes_from_hop_to_hop_to_the_client() -> None:
    read = Opening.read(Kind.OPEN, canonical.encode(OPENING))
    assert read == OPENING
    peer, protocol, second = read.onward((b"a", b"b"))
    assert (peer, protocol, second.request.span) == (B, CHAIN, Span(4, 6))
    peer, protocol, third = second.onward((b"c",))
    assert (peer, protocol, third.hops) == (C, CHAIN, ())
    peer, protocol, last = third.onward(())
    assert (peer, protocol, last.request.session) == (CLIENT, SINK, REQUEST.session)
    with pytest.raises(Rejected):
        Opening.read(Kind.DATA, canonical.encode(OPENING))


def test_the_longest_route_fits_into_a_frame() -> None:
    hops = tuple(Hop(B, Span(n, n + 1)) for n in range(4000, 4000 + MAX_HOPS - 1))
    request = dataclasses.replace(REQUEST, span=Span(3999, 4000))
    Opening(request, hops, CLIENT).frame()
    assert len(canonical.encode(Opening(request, hops, CLIENT))) < frames.MAX_META_BYTES


@pytest.mark.parametrize(
    "change",
    [
        {"hops": (Hop(B, Span(5, 6)),)},
        {"hops": tuple(Hop(B, Span(n, n + 1)) for n in range(4, 4 + MAX_HOPS))},
        {"hops": (Hop("nobody", Span(4, 6)),)},  # type: ignore[arg-type]
        {"client": "nobody"},
        {"request": dataclasses.replace(REQUEST, session="z" * 32)},
    ],
)
def test_an_opening_that_makes_no_sense_is_refused(change: dict[str, object]) -> None:
    fields = {field.name: getattr(OPENING, field.name) for field in dataclasses.fields(OPENING)}
    with pytest.raises(Rejected):
        Opening.read(Kind.OPEN, canonical.encode({**fields, **change}))


@given(st.sampled_from(sorted(vars(errors))), st.text(max_size=50), st.text(max_size=50))
def test_whatever_a_peer_says_becomes_an_error_of_ours(name: str, message: str, reason: str) -> None:
    failure = Failure.read(canonical.encode(Failure(name, message, "", reason, B)))
    error = failure.error_for(ROUTE, A)
    assert isinstance(error, errors.Rejected | errors.InvalidInput | errors.UsageError | PeerFailed)
    assert error.message.isprintable() or not error.message


def test_a_failure_names_the_peer_and_the_cause() -> None:
    error = Failure.of(Busy("Full.", "Later."), B).error_for(ROUTE, A)
    assert isinstance(error, PeerFailed)
    assert error.peer == B
    assert str(error) == f"Peer …{B[-8:]}: Full. Later."
    assert isinstance(error.__cause__, Busy)


def test_nobody_outside_of_the_route_is_blamed() -> None:
    error = Failure.of(PeerFailed("Gone.", CLIENT), C).error_for(ROUTE, B)
    assert isinstance(error, PeerFailed)
    assert error.peer == B


def test_a_long_story_is_cut() -> None:
    assert len(Failure.of(Busy("x" * 5000), A).message) == MAX_TEXT
