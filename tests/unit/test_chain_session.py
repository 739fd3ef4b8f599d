"""The client's end of a chain, against sockets whose other ends do as a test says."""

import socket
import threading
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from p2pmodel.domain.errors import PeerFailed
from p2pmodel.domain.swarm import Hop, Route, Span
from p2pmodel.swarm.chain_session import ChainSession
from p2pmodel.swarm.opening import Failure
from p2pmodel.swarm.watch import Watch
from p2pmodel.wire import frames
from p2pmodel.wire.frames import Kind
from p2pmodel.wire.signing import Key
from tests.support.waiting import until

A, B = (Key.generate().peer for _ in range(2))
MORE_THAN_A_SOCKET_TAKES = bytes(16 << 20)


class Ends(NamedTuple):
    """first, last: what the first and the last stage hold of the session's two sockets."""

    session: ChainSession
    first: socket.socket
    last: socket.socket


@pytest.fixture
def ends() -> Iterator[Ends]:
    (out, first), (sink, last) = socket.socketpair(), socket.socketpair()
    route = Route((Hop(A, Span(0, 4)), Hop(B, Span(4, 8))))
    session = ChainSession("0" * 32, route, out, sink, never_silent, lambda seconds: PeerFailed(f"{seconds} s passed."))
    with first, last:
        yield Ends(session, first, last)
        session.close()


def never_silent(_: object) -> Watch:
    raise AssertionError("nobody was silent long enough to be watched")


def test_a_first_stage_that_ends_while_it_is_sent_to_is_to_blame(ends: Ends) -> None:
    def end() -> None:
        until(lambda: ends.session.bytes_sent > 0)
        ends.first.close()

    ending = threading.Thread(target=end)
    ending.start()
    with pytest.raises(PeerFailed, match="broke off the stream") as caught:
        ends.session.step(MORE_THAN_A_SOCKET_TAKES, 0, 1)
    ending.join()
    assert caught.value.peer == A


@pytest.mark.parametrize("body", [b"little", MORE_THAN_A_SOCKET_TAKES], ids=["little", "much"])
def test_a_first_stage_that_ended_after_its_last_answer_is_to_blame_at_the_next_step(ends: Ends, body: bytes) -> None:
    ends.session.send(b"", 0, 1)
    ends.last.sendall(frames.pack(Kind.DATA, tokens=1))
    ends.first.close()
    ends.session.receive()
    with pytest.raises(PeerFailed, match="broke off the stream") as caught:
        ends.session.step(body, 1, 1)
    assert caught.value.peer == A


def test_a_first_stage_that_only_stopped_talking_is_to_blame_though_it_may_still_listen(ends: Ends) -> None:
    ends.session.send(b"", 0, 1)
    ends.last.sendall(frames.pack(Kind.DATA, tokens=1))
    ends.first.shutdown(socket.SHUT_WR)
    ends.session.receive()
    with pytest.raises(PeerFailed, match="broke off the stream") as caught:
        ends.session.step(MORE_THAN_A_SOCKET_TAKES, 1, 1)
    assert caught.value.peer == A


@pytest.mark.parametrize("body", [b"little", MORE_THAN_A_SOCKET_TAKES], ids=["little", "much"])
def test_what_the_last_stage_says_is_heard_though_the_first_one_is_gone(ends: Ends, body: bytes) -> None:
    ends.first.close()
    ends.last.sendall(Failure.of(PeerFailed("The one before ended.", A), B).frame())
    with pytest.raises(PeerFailed, match="The one before ended"):
        ends.session.step(body, 0, 1)


def test_a_last_stage_that_ends_while_a_gradient_is_sent_to_it_is_to_blame(ends: Ends) -> None:
    ends.last.close()
    ends.session.send_gradient(MORE_THAN_A_SOCKET_TAKES, 0)
    with pytest.raises(PeerFailed, match="broke off the stream") as caught:
        ends.session.receive_gradient()
    assert caught.value.peer == B
