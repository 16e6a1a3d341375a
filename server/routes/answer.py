"""The answer to a client, sent in pieces."""

import json
from typing import Any

from starlette.types import Send

from server.engines.exchange import Exchange
from server.engines.savings import Savings
from server.engines.streams import EventStream
from server.errors import EngineFailed


class Answer:
    """An answer on its way out: whole, or a stream."""

    def __init__(self, send: Send) -> None:
        """Send nothing yet."""
        self._send = send
        self._headers: dict[str, str] = {}
        self.stream: EventStream | None = None
        """What reads the engine's stream, once the stream to the client has begun."""

    def address(self, exchange: Exchange, headers: dict[str, str]) -> None:
        """Settle the headers."""
        savings = {} if exchange.savings is None else exchange.savings.as_headers()
        self._headers = {"content-type": exchange.content_type, **headers, **savings}

    async def start(self, stream: EventStream | None = None) -> None:
        """Send status and headers."""
        self.stream = stream
        headers = [(name.encode(), value.encode("latin-1")) for name, value in self._headers.items()]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def piece(self, body: bytes) -> None:
        """Send a piece of the body, not the last."""
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def finish(self, body: bytes) -> None:
        """Send the last piece, or all there is."""
        if self.stream is None:
            await self.start()
        await self._send({"type": "http.response.body", "body": body})


def with_savings(body: bytes, savings: Savings | None) -> bytes:
    """Return the engine's answer with `usage.video_tokens`, as it came if there are no savings to tell of.

    Raises EngineFailed if it is no JSON object.
    """
    if savings is None:
        return body
    try:
        content: Any = json.loads(body)
    except ValueError as exc:
        raise EngineFailed("the engine's answer could not be read") from exc
    if not isinstance(content, dict):
        raise EngineFailed("the engine's answer could not be read")
    usage = content.get("usage")
    content["usage"] = {**(usage if isinstance(usage, dict) else {}), "video_tokens": savings.as_usage()}
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
