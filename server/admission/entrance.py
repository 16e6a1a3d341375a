"""Everything a generating request must hold: a place in the gateway, memory, an engine slot, a connected client."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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
