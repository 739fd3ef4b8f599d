"""The loop of a server that computes in the thread which owns its streams: it waits for what happens on any of them,
takes in what is ready, and computes; so nothing passes another thread on its way."""

import contextlib
import logging
import queue
import selectors
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, TypeVar

from p2pmodel.domain.errors import P2PModelError, PeerFailed
from p2pmodel.domain.ids import PeerId
from p2pmodel.swarm.framing import SCRATCH_BYTES, Outbox
from p2pmodel.swarm.lingering import Lingering
from p2pmodel.swarm.opening import Failure

SWEEP_SECONDS = 0.5

log = logging.getLogger(__name__)

Member = TypeVar("Member")


class Reactor(ABC, Generic[Member]):
    """A subclass starts the thread, and knows its members, which have streams, and how to compute. All but `_call` and
    `_finish` is for the thread alone.

    members: those that are open, in the order in which they came; ready: of these, those with something to compute, in
    their turn; patience: seconds for which that may wait for more.
    """

    def __init__(self, peer: PeerId, thread: str) -> None:
        self._peer = peer
        self._members: dict[Member, None] = {}
        self._ready: dict[Member, None] = {}
        self._patience = 0.0
        self._selector = selectors.DefaultSelector()
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._lingering = Lingering(self._selector, self._scratch)
        self._wake, self._waker = socket.socketpair()
        for end in (self._wake, self._waker):
            end.setblocking(False)
        self._selector.register(self._wake, selectors.EVENT_READ, self._run_calls)
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._leaving = False
        self._next_sweep = 0.0
        self._thread = threading.Thread(target=self._serve, name=thread, daemon=True)

    @abstractmethod
    def _sweep(self, now: float) -> None:
        """Ends members that are of no use any more."""

    @abstractmethod
    def _compute(self, now: float) -> None:
        """After all that came in; whether or not anybody is ready."""

    @abstractmethod
    def _end_all(self, why: P2PModelError) -> None: ...

    def _call(self, what: Callable[[], None]) -> None:
        """Has the thread do it."""
        self._calls.put(what)
        with contextlib.suppress(OSError):  # then it is being woken already, or has ended
            self._waker.send(b"\0")

    def _finish(self) -> None:
        """Every member hears that this peer leaves. Returns when they have, or had the time to; at once where the
        thread does not run."""
        if self._thread.is_alive():
            self._call(self._leave)
            self._thread.join()

    def _listen(self, stream: socket.socket, before: int, wanted: int, happened: Callable[[int], None]) -> None:
        """before, wanted: the events that `happened` was called with, and is from now on."""
        if not wanted:
            self._selector.unregister(stream)
        elif before:
            self._selector.modify(stream, wanted, happened)
        else:
            self._selector.register(stream, wanted, happened)

    def _turn_away(self, stream: socket.socket, error: P2PModelError) -> None:
        """A stream that is nobody's yet."""
        stream.setblocking(False)
        outbox = Outbox()
        outbox.put(Failure.of(error, self._peer).frame())
        self._lingering.add(stream, outbox, quiet=False)

    def _serve(self) -> None:
        while not (self._leaving and not self._lingering):
            try:
                self._turn()
            except Exception:
                log.exception("thread %s failed; its streams end", self._thread.name)
                self._end_all(PeerFailed("This peer failed.", self._peer))
        self._selector.close()
        self._wake.close()
        self._waker.close()

    def _turn(self) -> None:
        idle = SWEEP_SECONDS if self._members or self._lingering else None
        for key, events in self._selector.select(self._patience if self._ready else idle):
            key.data(events)
        now = time.monotonic()
        if now >= self._next_sweep:  # after what came in during the last step, before the next one
            self._next_sweep = now + SWEEP_SECONDS
            self._sweep(now)
            self._lingering.sweep(now)
        self._compute(now)

    def _run_calls(self, _events: int) -> None:
        self._wake.recv(4096)
        while not self._calls.empty():
            self._calls.get()()

    def _leave(self) -> None:
        self._leaving = True
        self._end_all(PeerFailed("It leaves the swarm.", self._peer))
