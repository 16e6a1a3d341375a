"""The bounded queue in front of the engines."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from server.errors import Overloaded
from server.metrics import Metrics


class Gate:
    """Lets `max_concurrency` requests through to the engines at a time, and `max_queue` more wait or get ready."""

    def __init__(self, *, max_concurrency: int, max_queue: int, metrics: Metrics) -> None:
        """Start empty."""
        self._capacity = max_concurrency + max_queue
        self._admitted = 0
        self._engine_slots = asyncio.Semaphore(max_concurrency)
        self._metrics = metrics

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Hold a place in the gateway; raise Overloaded if all are taken."""
        if self._admitted >= self._capacity:
            raise Overloaded("too many requests are waiting, try again later")
        self._admitted += 1
        try:
            yield
        finally:
            self._admitted -= 1

    @asynccontextmanager
    async def engine_slot(self) -> AsyncIterator[None]:
        """Wait, first come first served, for one of the places in flight to the engines."""
        self._metrics.queue_depth.inc()
        try:
            await self._engine_slots.acquire()
        finally:
            self._metrics.queue_depth.dec()
        try:
            yield
        finally:
            self._engine_slots.release()
