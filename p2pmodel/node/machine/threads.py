"""How many CPU threads this process computes with, and work on a thread that nobody waits for at the end."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def use_threads(count: int | None) -> None:
    """None leaves PyTorch's default, all cores; several nodes on one machine are better off with a share each."""
    if count is not None:
        torch.set_num_threads(count)


async def in_daemon(work: Callable[..., T], *args: object) -> T:
    """As `asyncio.to_thread`, for what takes long and may be broken off: the process can end while it runs."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = work(*args)
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="fetch", daemon=True).start()
    return await done
