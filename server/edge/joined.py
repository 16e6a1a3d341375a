"""A transport that sends the head of an answer together with the beginning of its body.

uvicorn writes the head and the body one after the other. Each write is a system call, and wakes the client up.
"""

import asyncio
from typing import Any, Final

HEAD_BEGIN: Final = b"HTTP/1."


class JoinedHeads(asyncio.Transport):
    """A transport that holds each head back until the next write, or until the event loop has nothing else to do now.

    All other writes go on at once, so that the limits on unsent bytes hold as they do without this class.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        """Write to `transport`."""
        super().__init__()
        self._transport = transport
        self._loop = loop
        self._head: bytes | bytearray | memoryview = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send `data` with the head that waits, or hold it back if it is a head."""
        if self._head:
            head, self._head = self._head, b""
            self._transport.writelines((head, data))
        elif data[: len(HEAD_BEGIN)] == HEAD_BEGIN:
            self._head = data
            self._loop.call_soon(self._flush)
        else:
            self._transport.write(data)

    def _flush(self) -> None:
        if self._head:
            head, self._head = self._head, b""
            self._transport.write(head)

    def close(self) -> None:
        """Close the transport once all has been sent."""
        self._flush()
        self._transport.close()

    def abort(self) -> None:
        """Close the transport at once."""
        self._head = b""
        self._transport.abort()

    def is_closing(self) -> bool:
        """Return whether the transport is closed or is about to be."""
        return self._transport.is_closing()

    def pause_reading(self) -> None:
        """Take no more data from the client."""
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Take data from the client again."""
        self._transport.resume_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return what the transport knows about its connection."""
        return self._transport.get_extra_info(name, default)
