"""The bounded queue in front of the engines."""

import asyncio
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from time import monotonic

from server.admission.held import Held
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

    def admitted(self) -> AbstractContextManager[None]:
        """Return a context manager that holds a place in the gateway; it raises Overloaded if all are taken."""
        return Held(self._enter, self._leave)

    def engine_slot(self) -> AbstractAsyncContextManager[None]:
        """Return a context manager that holds an engine slot.

        Requests wait for a slot in the order in which they came (FIFO). It raises Overloaded if none is free in time.
        """
        return _EngineSlot(self)

    def _enter(self) -> None:
        if self._admitted >= self._capacity:
            raise Overloaded(
                "too many requests are waiting, try again later", retry_after_seconds=self._expected_wait()
            )
        self._admitted += 1
        self._metrics.inflight_requests.inc()

    def _leave(self) -> None:
        self._metrics.inflight_requests.dec()
        self._admitted -= 1

    async def take_slot(self) -> None:
        """Take an engine slot; raise Overloaded if none becomes free in time."""
        if self._engine_slots.locked():
            await self._wait_for_slot()
        else:
            await self._engine_slots.acquire()

    def give_slot_back(self, *, held_seconds: float) -> None:
        """Give an engine slot back that was held for so long."""
        self._slot_seconds += _WEIGHT_OF_NEWEST * (held_seconds - self._slot_seconds)
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


class _EngineSlot(AbstractAsyncContextManager[None]):
    """An engine slot while its block lasts."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def __aenter__(self) -> None:
        await self._gate.take_slot()
        self._begin = monotonic()

    async def __aexit__(self, *_exc: object) -> None:
        self._gate.give_slot_back(held_seconds=monotonic() - self._begin)
