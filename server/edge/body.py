"""Reads a request's body within limits of size and time."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import Receive

from server.admission.buffers import Buffer
from server.errors import BodyTimeout, BodyTooLarge, ClientGone, InvalidRequest, Overloaded

SKIM_SECONDS = 2.0  # for what of a refused body is still read
_MODEL = re.compile(rb'"model"\s*:\s*("(?:[^"\\]|\\.){1,200}")')
_MODEL_BYTES = 220
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
    receive: Receive,
    consume: Callable[[bytes], Awaitable[None]],
    *,
    announced: int | None,
    max_bytes: int,
    seconds: float,
) -> None:
    """Pass the body to `consume`, one piece at a time, and count the bytes. `announced` is the `declared_length`.

    The count decides whether the body is too large. A wrong `content-length` can't get around it.
    Raises BodyTooLarge, BodyTimeout or ClientGone.
    """
    if (announced or 0) > max_bytes:
        raise _too_large(max_bytes)
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
                    raise _too_large(max_bytes)
                await consume(piece)
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        raise BodyTimeout(f"the request body did not arrive within {seconds:g} seconds") from None


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the request body is larger than {max_bytes} bytes")


async def read_body(headers: Headers, receive: Receive, buffer: Buffer, limits: BodyLimits) -> bytearray:
    """Return the request's body, whose size is counted in `buffer`.

    Raises Overloaded if the buffer has no room, and the errors of `declared_length` and `consume_body`.
    """
    body = bytearray()
    announced = declared_length(headers) or 0
    if announced <= limits.max_bytes:  # a larger body gets BodyTooLarge, not Overloaded: a retry would not help
        buffer.expect(announced)

    async def keep(piece: bytes) -> None:
        try:
            buffer.grow(len(piece))
        except Overloaded as exc:
            exc.body_untouched = False
            raise
        body.extend(piece)

    await consume_body(receive, keep, announced=announced, max_bytes=limits.max_bytes, seconds=limits.seconds)
    return body


async def skim_model(headers: Headers, receive: Receive, known: Collection[str], *, max_bytes: int) -> str | None:
    """Return the model that the body of a refused request names, None if it names none of `known`.

    The body is read until then, at most `max_bytes` of it and for at most SKIM_SECONDS, and nothing of it is kept. A
    client that waits to be asked for its body (`expect`) is not asked.
    """
    if "expect" in headers or headers.get("content-type", "").startswith("multipart/"):
        return None
    size, window = 0, b""
    try:
        async with asyncio.timeout(SKIM_SECONDS):
            while size < max_bytes:
                message = await receive()
                piece = message.get("body", b"")
                size += len(piece)
                window = window[-_MODEL_BYTES:] + piece
                for name in map(_text, _MODEL.findall(window)):
                    if name in known:
                        return name
                if not message.get("more_body", False):
                    return None
    except TimeoutError:
        pass
    return None


def _text(literal: bytes) -> str:
    try:
        return str(json.loads(literal))
    except ValueError:
        return ""
