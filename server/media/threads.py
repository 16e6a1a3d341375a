"""Work that would hold up the event loop, in threads."""

import asyncio
from collections.abc import Callable
from typing import Protocol, TypeVar

OFF_LOOP_BYTES = 2**18  # larger pieces of work go to a thread

T = TypeVar("T")


class Closeable(Protocol):
    """Something that holds a file or a process."""

    def close(self) -> None:
        """Let go."""


C = TypeVar("C", bound=Closeable)


async def off_loop(work: Callable[..., T], *arguments: object, size_bytes: int) -> T:
    """Return what `work` returns; in a thread if it is about many bytes."""
    if size_bytes > OFF_LOOP_BYTES:
        return await asyncio.to_thread(work, *arguments)
    return work(*arguments)


async def opened_off_loop(work: Callable[..., C], *arguments: object) -> C:
    """Return what `work` opens in a thread; close it if nobody waits any more, which is when it has been opened."""
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
