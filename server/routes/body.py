"""A request's body, within limits of size and time."""

import asyncio

from starlette.datastructures import Headers
from starlette.types import Receive

from server.errors import BodyTimeout, BodyTooLarge, ClientGone, InvalidRequest


async def read_body(headers: Headers, receive: Receive, *, max_bytes: int, seconds: float) -> bytes:
    """Return the request's body; raise BodyTooLarge, BodyTimeout or ClientGone. A length that lies changes nothing."""
    too_large = BodyTooLarge(f"the request body is larger than {max_bytes} bytes")
    try:
        if int(headers.get("content-length", "0")) > max_bytes:
            raise too_large
    except ValueError:
        raise InvalidRequest("content-length must be a number") from None
    pieces, size = [], 0
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
                pieces.append(piece)
                if not message.get("more_body", False):
                    return b"".join(pieces)
    except TimeoutError:
        raise BodyTimeout(f"the request body did not arrive within {seconds:g} seconds") from None
