"""Deduplicates concurrent work: requests that need the same resource at the same time share it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class Shared(Generic[T]):
    """Opens a resource once for all callers that ask for the same key while it is being opened.

    A caller that asks after the resource has been opened opens a new one. The resource is closed when its last holder
    leaves. If all holders leave before it has been opened, the opening is cancelled.
    """

    def __init__(self) -> None:
        """Start with nothing open."""
        self._opening: dict[str, _Lease[T]] = {}

    @asynccontextmanager
    async def held(self, key: str, opened: Callable[[], AbstractAsyncContextManager[T]]) -> AsyncIterator[T]:
        """Yield the resource that is being opened under `key`, or else the one that `opened()` opens.

        Raises the error of the opening, for every caller that shares it.
        """
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
    """A shared resource. A task of its own opens and closes it, so that its holders may leave in any order."""

    def __init__(self, opened: Callable[[], AbstractAsyncContextManager[T]]) -> None:
        self.ready: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.holders = 0
        self._unused = asyncio.Event()
        self._task = asyncio.create_task(self._keep(opened()))

    async def _keep(self, opening: AbstractAsyncContextManager[T]) -> None:
        try:
            async with opening as thing:
                self.ready.set_result(thing)
                await self._unused.wait()
        except BaseException as exc:
            if self.ready.done():
                raise
            if isinstance(exc, Exception):
                self.ready.set_exception(exc)
                self.ready.exception()  # marks it as retrieved: asyncio would log it if all holders have left
            else:
                self.ready.cancel()

    async def end(self) -> None:
        """Close the resource, or cancel its opening."""
        if self.ready.done():
            self._unused.set()
        else:
            self._task.cancel()
        await asyncio.wait([self._task])  # not `await self._task`: our own cancellation must not cancel the task
