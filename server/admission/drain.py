"""Graceful shutdown: new requests are refused, and running requests may finish within a time limit."""

import asyncio
from contextlib import AbstractContextManager
from time import monotonic
from types import TracebackType
from typing import Self

from starlette.types import Receive

from server.admission.held import Held
from server.errors import ClientGone, Draining, GatewayError

WATCH_AFTER_SECONDS = 0.02  # a request that is over by then needs no task that watches its client


class Drain:
    """The state of the shutdown: whether it has begun, and which requests are still running."""

    def __init__(self, drain_seconds: float) -> None:
        """Start in normal operation. `drain_seconds` is the time that running requests have to finish."""
        self._drain_seconds = drain_seconds
        self._deadline: float | None = None
        self._in_flight = 0
        self._leashes: set[Leash] = set()

    @property
    def has_begun(self) -> bool:
        """Whether the shutdown has begun."""
        return self._deadline is not None

    def begin(self) -> None:
        """Begin the shutdown. Idempotent: a second call does not move the deadline."""
        self._deadline = self._deadline or monotonic() + self._drain_seconds

    def finished(self) -> bool:
        """Return whether the process may end. Once the time is up, also interrupt all requests that still run."""
        if self._deadline is None:
            return False
        if monotonic() >= self._deadline:
            for leash in tuple(self._leashes):
                leash.cut(Draining("the gateway is shutting down"))
            return True
        return self._in_flight == 0

    def request(self) -> AbstractContextManager[None]:
        """Return a context manager that counts a request, so that the shutdown waits for it.

        It raises Draining if the shutdown has begun.
        """
        return Held(self._enter, self._leave)

    def _enter(self) -> None:
        if self.has_begun:
            raise Draining("the gateway is shutting down")
        self._in_flight += 1

    def _leave(self) -> None:
        self._in_flight -= 1

    def leash(self, receive: Receive) -> "Leash":
        """Return a context manager that interrupts its block if the client disconnects or the drain time is up.

        The block then raises ClientGone or Draining.
        """
        return Leash(receive, self._leashes)


class Leash:
    """A context manager that can interrupt its block: `cut` cancels the task, and the block raises the reason."""

    def __init__(self, receive: Receive, others: "set[Leash]") -> None:
        """Prepare to watch `receive` for the client's disconnect. The body must have been read already.

        While the block runs, the leash is in the set `others`.
        """
        self._receive = receive
        self._others = others
        self._reason: GatewayError | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Watch the client from WATCH_AFTER_SECONDS on; `cut` works at once."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine always runs in a task
        self._task = task
        self._others.add(self)
        self._start = asyncio.get_running_loop().call_later(WATCH_AFTER_SECONDS, self._start_watching)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop watching. If `cut` has cancelled the task, raise its reason in place of the CancelledError."""
        self._others.discard(self)
        self._start.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        if self._reason is not None and self._task.uncancel() == 0 and exc_type is asyncio.CancelledError:
            raise self._reason from None

    def cut(self, reason: GatewayError) -> None:
        """Interrupt the block with `reason`. Only the first call has an effect."""
        if self._reason is None:
            self._reason = reason
            self._task.cancel()

    def _start_watching(self) -> None:
        self._watcher = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.cut(ClientGone("the client closed the connection"))
