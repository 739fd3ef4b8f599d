"""Frames between the node and its gossip child."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmodel.domain.errors import Rejected
from p2pmodel.gossip import frames

messages = st.one_of(
    st.builds(frames.Ready, st.text(max_size=60), st.lists(st.text(max_size=60), max_size=3).map(tuple)),
    st.builds(frames.Failed, st.booleans(), st.text(max_size=60)),
    st.builds(frames.Published, st.integers(0, 2**63), st.text(max_size=20)),
    st.builds(frames.Received, st.binary(max_size=4096)),
    st.builds(
        frames.Status, st.integers(0, 1000), st.dictionaries(st.text(max_size=10), st.integers(0, 2**40), max_size=4)
    ),
)


@given(st.lists(messages, max_size=6), st.integers(1, 50))
def test_messages_survive_however_the_stream_is_cut(sent: list[frames.FromChild], piece: int) -> None:
    raw = b"".join(map(frames.encode, sent))
    buffer: frames.FrameBuffer[frames.FromChild] = frames.FrameBuffer(frames.FromChild)
    assert [m for at in range(0, len(raw), piece) for m in buffer.feed(raw[at : at + piece])] == sent


def test_a_frame_too_large_is_refused_by_its_length() -> None:
    buffer: frames.FrameBuffer[frames.FromChild] = frames.FrameBuffer(frames.FromChild)
    with pytest.raises(Rejected, match="over the limit"):
        list(buffer.feed(frames.LENGTH.pack(frames.MAX_FRAME_BYTES + 1)))
    with pytest.raises(ValueError, match="over the limit"):
        frames.encode(frames.Received(bytes(frames.MAX_FRAME_BYTES)))


@given(st.binary(max_size=60))
def test_nonsense_is_refused_and_nothing_else(body: bytes) -> None:
    buffer: frames.FrameBuffer[frames.ToChild] = frames.FrameBuffer(frames.ToChild)
    with pytest.raises(Rejected):
        list(buffer.feed(frames.LENGTH.pack(len(body)) + body))


def test_one_side_does_not_take_the_others_messages() -> None:
    buffer: frames.FrameBuffer[frames.ToChild] = frames.FrameBuffer(frames.ToChild)
    with pytest.raises(Rejected):
        list(buffer.feed(frames.encode(frames.Received(b""))))
