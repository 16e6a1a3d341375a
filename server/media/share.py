"""One piece of work for all who want the same thing at the same time."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class Shared(Generic[T]):
    """Opens a thing once for all who ask for it, under one key, before it is there; whoever asks later gets a new one.

    It is closed when the last of them leaves; if that is before it is there, its opening is cancelled.
    """

    def __init__(self) -> None:
        """Start with nothing open."""
        self._opening: dict[str, _Lease[T]] = {}

    @asynccontextmanager
    async def held(self, key: str, opened: Callable[[], AbstractAsyncContextManager[T]]) -> AsyncIterator[T]:
        """Give what `opened` gives, or what is being opened under `key`; raise what the opening raises."""
        lease = self._opening.get(key)
        if lease is None:
            lease = self._opening[key] = _Lease(opened)
            lease.ready.add_done_callback(lambda _: self._forget(key, lease))
        lease.holders += 1
        try:
            yield await asyncio.shield(lease.ready)
        finally:
            lease.holders -= 1
            if not lease.holders:
                self._forget(key, lease)
                await lease.end()

    def _forget(self, key: str, lease: "_Lease[T]") -> None:
        if self._opening.get(key) is lease:
            del self._opening[key]


class _Lease(Generic[T]):
    """A thing that a task of its own opens and closes, so that none of its holders has to outlive the others."""

    def __init__(self, opened: Callable[[], AbstractAsyncContextManager[T]]) -> None:
        self.ready: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.holders = 0
        self._unused = asyncio.Event()
        self._task = asyncio.create_task(self._keep(opened))

    async def _keep(self, opened: Callable[[], AbstractAsyncContextManager[T]]) -> None:
        try:
            async with opened() as thing:
                self.ready.set_result(thing)
                await self._unused.wait()
        except BaseException as exc:
            if self.ready.done():
                raise
            if isinstance(exc, Exception):
                self.ready.set_exception(exc)
                self.ready.exception()  # seen, even if all who waited for it have left
            else:
                self.ready.cancel()

    async def end(self) -> None:
        """Close the thing, or give up opening it."""
        if self.ready.done():
            self._unused.set()
        else:
            self._task.cancel()
        await asyncio.wait([self._task])  # unlike awaiting it, this neither cancels it nor hides a cancellation
