"""Runs work in threads that would otherwise block the event loop."""

import asyncio
from collections.abc import Callable
from typing import Protocol, TypeVar

OFF_LOOP_BYTES = 2**18  # work on more bytes goes to a thread

T = TypeVar("T")


class Closeable(Protocol):
    """An object that holds a file or a process."""

    def close(self) -> None:
        """Release the file or the process."""


C = TypeVar("C", bound=Closeable)


async def off_loop(work: Callable[..., T], *arguments: object, size_bytes: int) -> T:
    """Return `work(*arguments)`, computed in a thread if `size_bytes` is more than OFF_LOOP_BYTES."""
    if size_bytes > OFF_LOOP_BYTES:
        return await asyncio.to_thread(work, *arguments)
    return work(*arguments)


async def opened_off_loop(work: Callable[..., C], *arguments: object) -> C:
    """Return the object that `work(*arguments)` opens in a thread.

    If the caller is cancelled meanwhile, the object is closed as soon as it has been opened, so that it can't leak.
    """
    opening = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_close)
        await asyncio.wait([opening])
        raise


def _close(opening: asyncio.Future[C]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
