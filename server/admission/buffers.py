"""What requests hold in memory, bounded over all of them: their bodies, and the media fetched for them."""

from collections.abc import Iterator
from contextlib import contextmanager

from server.errors import Overloaded
from server.observe.metrics import Metrics

FREE_BYTES = 64 * 1024  # of each request: text is answered also while videos take all there is


class Buffers:
    """Room for `max_bytes`. Nobody waits for room: requests that have come in half way would wait for each other."""

    def __init__(self, *, max_bytes: int, metrics: Metrics) -> None:
        """Start empty."""
        self._max_bytes = max_bytes
        self._taken_bytes = 0
        self._gauge = metrics.buffered_bytes

    @contextmanager
    def buffer(self) -> Iterator["Buffer"]:
        """Give a request's share, empty at first, which is free again after the block."""
        buffer = Buffer(self)
        try:
            yield buffer
        finally:
            buffer.resize(0)

    def check(self, more_bytes: int) -> None:
        """Raise Overloaded if there is no room for so much more."""
        if more_bytes > 0 and self._taken_bytes + more_bytes > self._max_bytes:
            raise Overloaded("the gateway holds too much for other requests, try again later")

    def take(self, more_bytes: int) -> None:
        """Take room, or give it back if `more_bytes` is negative; raise Overloaded if there is none."""
        self.check(more_bytes)
        self._taken_bytes += more_bytes
        self._gauge.set(self._taken_bytes)


class Buffer:
    """What one request holds."""

    def __init__(self, buffers: Buffers) -> None:
        """Hold nothing."""
        self._buffers = buffers
        self._size_bytes = 0

    def expect(self, size_bytes: int) -> None:
        """Raise Overloaded if so much would not fit now; room is taken by what arrives, not by what is announced."""
        self._buffers.check(_counted(size_bytes) - _counted(self._size_bytes))

    def grow(self, more_bytes: int) -> None:
        """Hold more; raises as `resize`."""
        self.resize(self._size_bytes + more_bytes)

    def resize(self, size_bytes: int) -> None:
        """Hold so much; raise Overloaded if it is more than before and there is no room for it."""
        self._buffers.take(_counted(size_bytes) - _counted(self._size_bytes))
        self._size_bytes = size_bytes


def _counted(size_bytes: int) -> int:
    return max(0, size_bytes - FREE_BYTES)
