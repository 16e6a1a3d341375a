"""Sends the answer to the client, in pieces."""

from typing import Any

import msgspec
from starlette.types import Send

from server.engines.exchange import Exchange
from server.engines.naming import renamed
from server.engines.savings import Savings, with_savings
from server.engines.streams import EventStream
from server.errors import EngineFailed


class Answer:
    """The answer to one request, whole or as a stream."""

    def __init__(self, send: Send) -> None:
        """Start with nothing sent."""
        self._send = send
        self._headers: dict[str, str] = {}
        self.stream: EventStream | None = None
        """The parser of the engine's stream. None until the stream to the client has begun."""

    def address(self, exchange: Exchange, headers: dict[str, str]) -> None:
        """Set the headers: content type, `headers` and the savings."""
        savings = {} if exchange.savings is None else exchange.savings.as_headers()
        self._headers = {"content-type": exchange.content_type, **headers, **savings}

    def whole(self, body: bytes) -> bytes:
        """Set the headers for a JSON body of the gateway's own, and return it."""
        self._headers = {"content-type": "application/json", "content-length": str(len(body))}
        return body

    async def start(self, stream: EventStream | None = None) -> None:
        """Send the status 200 and the headers."""
        self.stream = stream
        headers = [(name.encode(), value.encode("latin-1")) for name, value in self._headers.items()]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def piece(self, body: bytes) -> None:
        """Send a piece of the body that is not the last one."""
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def finish(self, body: bytes) -> None:
        """Send the last piece of a stream, or the whole answer."""
        if self.stream is None:
            await self.start()
        await self._send({"type": "http.response.body", "body": body})


def as_asked(body: bytes, savings: Savings | None, *, model: str) -> bytes:
    """Return the engine's answer with the model's name that was asked for, and the savings in `usage.video_tokens`.

    The rest of the answer is unchanged. Raises EngineFailed if there are savings, and the answer neither has a usage
    nor is a JSON object.
    """
    if savings is not None:
        body = with_savings(body, savings) or _parsed_with_savings(body, savings)
    return renamed(body, model)


def _parsed_with_savings(body: bytes, savings: Savings) -> bytes:
    try:
        content = msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.MsgspecError, ValueError) as exc:
        raise EngineFailed("the engine's answer could not be read") from exc
    usage = content.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    content["usage"] = {**usage, "video_tokens": savings.as_usage(usage)}
    return msgspec.json.encode(content)
