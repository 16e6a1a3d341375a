"""Shutting down: what runs may finish within a time, nothing new is taken."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from types import TracebackType
from typing import Self

from starlette.types import Receive

from server.errors import ClientGone, Draining, GatewayError


class Drain:
    """Knows whether the gateway is draining, and which requests it still has to finish."""

    def __init__(self, drain_seconds: float) -> None:
        """Start serving."""
        self._drain_seconds = drain_seconds
        self._deadline: float | None = None
        self._in_flight = 0
        self._leashes: set[Leash] = set()

    @property
    def has_begun(self) -> bool:
        """Whether shutting down has begun."""
        return self._deadline is not None

    def begin(self) -> None:
        """Begin shutting down: nothing new is taken, what runs may finish."""
        self._deadline = self._deadline or monotonic() + self._drain_seconds

    def finished(self) -> bool:
        """Return whether the process may end; once the time is up, cut off what still runs."""
        if self._deadline is None:
            return False
        if monotonic() >= self._deadline:
            for leash in tuple(self._leashes):
                leash.cut(Draining("the gateway is shutting down"))
            return True
        return self._in_flight == 0

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count a request that a drain waits for; raise Draining if one has begun."""
        if self.has_begun:
            raise Draining("the gateway is shutting down")
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1

    def leash(self, receive: Receive) -> "Leash":
        """Return a block that ends with ClientGone when the client leaves and with Draining when the time is up."""
        return Leash(receive, self._leashes)


class Leash:
    """Runs a block in the current task and cancels it for a reason, which the block then raises."""

    def __init__(self, receive: Receive, others: "set[Leash]") -> None:
        """Prepare to watch `receive`, whose body has been read, for the client's leaving."""
        self._receive = receive
        self._others = others
        self._reason: GatewayError | None = None

    async def __aenter__(self) -> Self:
        """Start watching."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine always runs in a task
        self._task = task
        self._others.add(self)
        self._watcher = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop watching; a cancellation of ours becomes its reason."""
        self._others.discard(self)
        self._watcher.cancel()
        if self._reason is not None and self._task.uncancel() == 0 and exc_type is asyncio.CancelledError:
            raise self._reason from None

    def cut(self, reason: GatewayError) -> None:
        """End the block with `reason`, unless it has been cut already."""
        if self._reason is None:
            self._reason = reason
            self._task.cancel()

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.cut(ClientGone("the client closed the connection"))
