"""Reads a request's body within limits of size and time."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import Receive

from server.admission.buffers import Buffer
from server.errors import BodyTimeout, BodyTooLarge, ClientGone, InvalidRequest

_LENGTH = re.compile(r"[0-9]{1,18}")


@dataclass(frozen=True)
class BodyLimits:
    """The largest size of a body, and the longest time until all of it has arrived."""

    max_bytes: int
    seconds: float


def declared_length(headers: Headers) -> int | None:
    """Return the value of the `content-length` header, or None if it is missing.

    Raises InvalidRequest if the value is not a number.
    """
    length = headers.get("content-length")
    if length is None:
        return None
    if not _LENGTH.fullmatch(length):
        raise InvalidRequest("content-length must be a number")
    return int(length)


async def consume_body(
    headers: Headers, receive: Receive, consume: Callable[[bytes], Awaitable[None]], *, max_bytes: int, seconds: float
) -> None:
    """Pass the body to `consume`, one piece at a time, and count the bytes.

    The count decides whether the body is too large. A wrong `content-length` can't get around it.
    Raises BodyTooLarge, BodyTimeout or ClientGone, and InvalidRequest if `content-length` is not a number.
    """
    too_large = BodyTooLarge(f"the request body is larger than {max_bytes} bytes")
    if (declared_length(headers) or 0) > max_bytes:
        raise too_large
    size = 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone("the client closed the connection")
                piece = message.get("body", b"")
                size += len(piece)
                if size > max_bytes:
                    raise too_large
                await consume(piece)
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        raise BodyTimeout(f"the request body did not arrive within {seconds:g} seconds") from None


async def read_body(headers: Headers, receive: Receive, buffer: Buffer, limits: BodyLimits) -> bytearray:
    """Return the request's body, whose size is counted in `buffer`.

    Raises Overloaded if the buffer has no room, and the errors of `consume_body`.
    """
    body = bytearray()
    announced = declared_length(headers) or 0
    if announced <= limits.max_bytes:  # a larger body gets BodyTooLarge, not Overloaded: a retry would not help
        buffer.expect(announced)

    async def keep(piece: bytes) -> None:
        buffer.grow(len(piece))
        body.extend(piece)

    await consume_body(headers, receive, keep, max_bytes=limits.max_bytes, seconds=limits.seconds)
    return body
