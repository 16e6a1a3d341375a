"""The bounded queue in front of the engines."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from time import monotonic

from server.errors import Overloaded
from server.observe.metrics import Metrics

LONGEST_RETRY_AFTER_SECONDS = 60.0
_WEIGHT_OF_NEWEST = 0.2


class Gate:
    """Limits the generating requests inside the gateway.

    At most `max_concurrency` requests are at the engines at the same time. At most `max_queue` more may be inside the
    gateway, where they are prepared or wait. A request that has waited for `queue_seconds` is refused.
    """

    def __init__(self, *, max_concurrency: int, max_queue: int, queue_seconds: float, metrics: Metrics) -> None:
        """Start with no requests."""
        self._max_concurrency = max_concurrency
        self._capacity = max_concurrency + max_queue
        self._queue_seconds = queue_seconds
        self._admitted = 0
        self._engine_slots = asyncio.Semaphore(max_concurrency)
        self._slot_seconds = 1.0
        self._metrics = metrics

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Hold a place in the gateway; raise Overloaded if all places are taken."""
        if self._admitted >= self._capacity:
            raise Overloaded(
                "too many requests are waiting, try again later", retry_after_seconds=self._expected_wait()
            )
        self._admitted += 1
        self._metrics.inflight_requests.inc()
        try:
            yield
        finally:
            self._metrics.inflight_requests.dec()
            self._admitted -= 1

    @asynccontextmanager
    async def engine_slot(self) -> AsyncIterator[None]:
        """Hold an engine slot. Requests wait for a slot in the order in which they came (FIFO).

        Raises Overloaded if no slot becomes free in time.
        """
        if self._engine_slots.locked():
            await self._wait_for_slot()
        else:
            await self._engine_slots.acquire()
        begin = monotonic()
        try:
            yield
        finally:
            self._slot_seconds += _WEIGHT_OF_NEWEST * (monotonic() - begin - self._slot_seconds)
            self._engine_slots.release()

    async def _wait_for_slot(self) -> None:
        self._metrics.queue_depth.inc()
        try:
            async with asyncio.timeout(self._queue_seconds):
                await self._engine_slots.acquire()
        except TimeoutError:
            raise Overloaded(
                f"no engine became free within {self._queue_seconds:g} seconds, try again later",
                retry_after_seconds=self._expected_wait(),
            ) from None
        finally:
            self._metrics.queue_depth.dec()

    def _expected_wait(self) -> float:
        """Return the expected wait in seconds: the queue's length times the moving average of the time per slot."""
        in_line = max(1, self._admitted - self._max_concurrency)
        return min(self._slot_seconds * in_line / self._max_concurrency, LONGEST_RETRY_AFTER_SECONDS)
