"""How a generating request comes in: it holds a place and a share of the memory, and leaves when its client does."""

from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass

from starlette.types import Receive

from server.admission.buffers import Buffer, Buffers
from server.admission.drain import Drain
from server.admission.gate import Gate


@dataclass(frozen=True)
class Entrance:
    """The bounds over all generating requests."""

    gate: Gate
    buffers: Buffers
    drain: Drain

    @contextmanager
    def admitted(self) -> Iterator[Buffer]:
        """Hold a place in the gateway, and give the request's buffer; raise Overloaded if all places are taken."""
        with self.gate.admitted(), self.buffers.buffer() as buffer:
            yield buffer

    def engine_slot(self) -> AbstractAsyncContextManager[None]:
        """Return a block in which an engine may have the request; entering it waits, and raises Overloaded."""
        return self.gate.engine_slot()

    def leash(self, receive: Receive) -> AbstractAsyncContextManager[object]:
        """Return a block that ends with ClientGone when the client leaves and with Draining when the time is up."""
        return self.drain.leash(receive)
