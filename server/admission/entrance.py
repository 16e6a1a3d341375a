"""Everything a generating request must hold: a place in the gateway, memory, an engine slot, a connected client."""

from dataclasses import dataclass

from server.admission.buffers import Buffers
from server.admission.drain import Drain
from server.admission.gate import Gate


@dataclass(frozen=True)
class Entrance:
    """The limits over all generating requests together."""

    gate: Gate
    buffers: Buffers
    drain: Drain
