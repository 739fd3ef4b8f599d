"""An event loop in a thread of its own, for callers that block."""

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import uvloop

from p2pmodel.domain.errors import NotRunning

T = TypeVar("T")


class LoopThread:
    """Runs from when it is made until `close`."""

    def __init__(self, name: str) -> None:
        ready = threading.Event()
        self.closed = False
        self._closing = threading.Lock()
        self._thread = threading.Thread(target=self._run, args=(ready,), name=name, daemon=True)
        self._thread.start()
        ready.wait()

    def submit(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Raises NotRunning when the loop is closed."""
        with self._closing:
            if not self.closed:
                return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        raise NotRunning("This client has left the swarm.", "Make another one.")

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Its result, or what it raised. Not from the loop's own thread."""
        return self.submit(work).result()

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
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            self._loop, self._stopping = runner.get_loop(), asyncio.Event()
            ready.set()
            runner.run(self._until_stopped())

    async def _until_stopped(self) -> None:
        await self._stopping.wait()
