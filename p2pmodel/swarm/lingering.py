"""The last words on streams that end. Closing an end at once could discard what the other has not read yet, so what was
said last is kept open until the other end closes, or has had time to."""

import selectors
import socket
import time
from functools import partial

from p2pmodel.swarm.framing import Outbox

LINGER_SECONDS = 2.0


class Lingering:
    """Streams in `selector`, whose keys' data is called with the events. One thread uses all of it."""

    def __init__(self, selector: selectors.BaseSelector, scratch: memoryview) -> None:
        self._selector, self._scratch = selector, scratch
        self._until: dict[socket.socket, float] = {}

    def __len__(self) -> int:
        return len(self._until)

    def add(self, stream: socket.socket, outbox: Outbox, *, quiet: bool) -> None:
        """Sends what is in `outbox`, drops what comes in. The stream must not be registered, and does not block.
        quiet: nothing but a last word can come from the other end, which then waits for this one to close."""
        self._until[stream] = time.monotonic() + LINGER_SECONDS
        both = selectors.EVENT_READ | selectors.EVENT_WRITE
        self._selector.register(stream, both, partial(self._happened, stream, outbox, quiet))

    def sweep(self, now: float) -> None:
        for stream in [stream for stream, until in self._until.items() if until < now]:
            self._close(stream)

    def _happened(self, stream: socket.socket, outbox: Outbox, quiet: bool, events: int) -> None:
        if stream not in self._until:
            return
        try:
            if events & selectors.EVENT_WRITE:
                outbox.flush(stream)
                if not outbox.size:
                    happened = partial(self._happened, stream, outbox, quiet)
                    self._selector.modify(stream, selectors.EVENT_READ, happened)
            if events & selectors.EVENT_READ and (not stream.recv_into(self._scratch) or quiet):
                self._close(stream)
        except BlockingIOError:
            return
        except OSError:
            self._close(stream)

    def _close(self, stream: socket.socket) -> None:
        del self._until[stream]
        self._selector.unregister(stream)
        stream.close()
