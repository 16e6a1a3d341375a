"""Everything a generating request must hold: a place in the gateway, memory, an engine slot, a connected client."""

from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass

from starlette.types import Receive

from server.admission.buffers import Buffer, Buffers
from server.admission.drain import Drain
from server.admission.gate import Gate


@dataclass(frozen=True)
class Entrance:
    """The limits over all generating requests together."""

    gate: Gate
    buffers: Buffers
    drain: Drain

    @contextmanager
    def admitted(self) -> Iterator[Buffer]:
        """Hold a place in the gateway and yield the request's buffer; raise Overloaded if all places are taken."""
        with self.gate.admitted(), self.buffers.buffer() as buffer:
            yield buffer

    def engine_slot(self) -> AbstractAsyncContextManager[None]:
        """Return a context manager that holds one of the slots for requests at the engines.

        Entering it waits for a free slot, and raises Overloaded if none becomes free in time.
        """
        return self.gate.engine_slot()

    def leash(self, receive: Receive) -> AbstractAsyncContextManager[object]:
        """Return a context manager that interrupts its block if the client disconnects or the drain time is up.

        The block then raises ClientGone or Draining.
        """
        return self.drain.leash(receive)
