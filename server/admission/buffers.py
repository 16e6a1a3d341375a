"""A bound on the memory that all requests together hold: their bodies, and the media fetched for them."""

from contextlib import AbstractContextManager
from typing import Self

from server.errors import Overloaded
from server.observe.metrics import Metrics

FREE_BYTES = 64 * 1024  # per request, not counted: text requests still get through when videos use the whole bound


class Buffers:
    """Memory for all requests, bounded by `max_bytes`.

    A request that finds no room fails at once. If it waited, requests whose bodies have arrived in part could wait
    for each other: a deadlock.
    """

    def __init__(self, *, max_bytes: int, metrics: Metrics) -> None:
        """Start with no memory taken."""
        self._max_bytes = max_bytes
        self._taken_bytes = 0
        self._gauge = metrics.buffered_bytes

    def buffer(self) -> "Buffer":
        """Return the buffer of one request, empty at first."""
        return Buffer(self)

    def check(self, more_bytes: int) -> None:
        """Raise Overloaded if there is no room for `more_bytes`."""
        if more_bytes > 0 and self._taken_bytes + more_bytes > self._max_bytes:
            raise Overloaded("the gateway's memory for requests is full, try again later")

    def take(self, more_bytes: int) -> None:
        """Take `more_bytes`, or give them back if the number is negative; raise Overloaded if there is no room."""
        if more_bytes:
            self.check(more_bytes)
            self._taken_bytes += more_bytes
            self._gauge.set(self._taken_bytes)


class Buffer(AbstractContextManager["Buffer"]):
    """The count of the bytes that one request holds in memory. All of them are given back when its block ends."""

    def __init__(self, buffers: Buffers) -> None:
        """Start with no bytes."""
        self._buffers = buffers
        self._size_bytes = 0

    def __enter__(self) -> Self:
        """Begin the block."""
        return self

    def __exit__(self, *_exc: object) -> None:
        """Give back what the buffer holds."""
        self.resize(0)

    def expect(self, size_bytes: int) -> None:
        """Raise Overloaded if `size_bytes` would not fit now.

        This takes no memory: only bytes that have arrived count, not those that a header announces.
        """
        self._buffers.check(_counted(size_bytes) - _counted(self._size_bytes))

    def grow(self, more_bytes: int) -> None:
        """Hold `more_bytes` in addition; raises Overloaded as `resize` does."""
        self.resize(self._size_bytes + more_bytes)

    def resize(self, size_bytes: int) -> None:
        """Hold `size_bytes` in total; raise Overloaded if that is more than before and there is no room for it."""
        self._buffers.take(_counted(size_bytes) - _counted(self._size_bytes))
        self._size_bytes = size_bytes


def _counted(size_bytes: int) -> int:
    return max(0, size_bytes - FREE_BYTES)
