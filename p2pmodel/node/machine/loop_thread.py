"""An event loop in a thread of its own, for callers that block."""

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

import uvloop

from p2pmodel.domain.errors import Busy, NotRunning

T = TypeVar("T")
log = logging.getLogger(__name__)

STOP_SECONDS = 0.25
"""Between two looks whether what is waited for is still wanted."""


class LoopThread:
    """Runs from when it is made until `close`."""

    def __init__(self, name: str) -> None:
        """Raises Busy when the process is out of descriptors or threads."""
        ready = threading.Event()
        self.closed = False
        self._closing = threading.Lock()
        self._failed: OSError | None = None
        self._thread = threading.Thread(target=self._run, args=(ready,), name=name, daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise Busy(f"No event loop can be started: {error}.", "Raise the limit of threads.") from None
        ready.wait()
        if self._failed is not None:
            hint = "Raise the limit of open files."
            raise Busy(f"No event loop can be started: {self._failed.strerror}.", hint) from None

    @property
    def is_current(self) -> bool:
        """Whether this is the loop's own thread, which must not wait for it."""
        return threading.current_thread() is self._thread

    def submit(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Raises NotRunning when the loop is closed."""
        with self._closing:
            if not self.closed:
                return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        raise _has_left()

    def wait(self, work: Coroutine[Any, Any, T], stopped: Callable[[], bool] | None = None) -> T:
        """Its result, or what it raised; NotRunning when the loop is closed meanwhile. Not from the loop's own thread.

        stopped: is asked now and then whether nobody wants the result any more; then the work is cancelled, and
        NotRunning raised.
        """
        waiting = self.submit(work)
        try:
            while True:
                try:
                    return waiting.result(STOP_SECONDS if stopped else None)
                except TimeoutError:
                    if waiting.done() or stopped is None:  # it is the work's own
                        raise
                    if stopped():
                        raise NotRunning("Nobody waits for this any more.") from None
        except CancelledError:
            raise _has_left() from None
        finally:
            waiting.cancel()  # nothing, where it has ended

    def close(self) -> None:
        """Cancels what still runs, and returns when it has ended. Closing twice is closing once."""
        with self._closing:  # so all that was submitted before has begun, and is cancelled
            if not self.closed:
                self.closed = True
                self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    def _run(self, ready: threading.Event) -> None:
        # Not loop.run_forever and loop.close: tasks and transports that outlive their loop are destroyed at the end of
        # the interpreter, when what they refer to is gone.
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                self._loop, self._stopping = runner.get_loop(), asyncio.Event()
                ready.set()
                runner.run(self._until_stopped())
        except OSError as error:
            if ready.is_set():
                raise
            self._failed = error
        except RuntimeError as error:  # from Python 3.12 on, no thread can be started at the end of the interpreter
            if not self.closed:
                raise
            log.debug("the loop did not end in order: %s", error)
        finally:
            ready.set()

    async def _until_stopped(self) -> None:
        await self._stopping.wait()


def _has_left() -> NotRunning:
    return NotRunning("This client has left the swarm.", "Make another one.")
