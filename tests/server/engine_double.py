"""A small HTTP server that speaks vLLM's wire format and misbehaves on demand: slow, failing, dying in a stream.

In a process of its own (`python -m tests.server.engine_double PORT`), it is controlled over HTTP. `POST /double` sets
attributes and holds answers back. `GET /double` returns how many requests it has received and how many are running.
"""

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

SAVED = {
    "x-aot-video-tokens-before": "6272",
    "x-aot-video-tokens-after": "627",
    "x-aot-video-retention": "0.1",
}
COMPLETION = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1790000000,
    "model": "llava",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Ein Hund läuft, „schnell“ 🐕", "tool_calls": []},
            "logprobs": {"content": [{"token": "Ein", "logprob": -0.30000001192092896}]},
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ],
    "usage": {
        "prompt_tokens": 640,
        "total_tokens": 652,
        "completion_tokens": 12,
        "prompt_tokens_details": {"multimodal_tokens": {"video": 627}},
    },
    "prompt_logprobs": None,
}


def chunk(**fields: Any) -> bytes:
    """Return one event as vLLM writes it."""
    base = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1790000000, "model": "llava"}
    return b"data: " + json.dumps({**base, **fields}, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def delta(text: str, *, finish: str | None = None) -> bytes:
    """Return one event with a piece of text."""
    choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": finish}
    return chunk(choices=[choice])


ROLE = chunk(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
TEXT = [delta("Ein "), delta('Hund "usage" läuft 🐕'), delta("\n\n"), delta(".", finish="stop")]
USAGE = chunk(choices=[], usage={"prompt_tokens": 640, "total_tokens": 652, "completion_tokens": 12})
DONE = b"data: [DONE]\n\n"

TEXT_COMPLETION = {
    "id": "cmpl-1",
    "object": "text_completion",
    "created": 1790000000,
    "model": "llava",
    "choices": [{"index": 0, "text": "Hund", "logprobs": None, "finish_reason": "length"}],
    "usage": {"prompt_tokens": 2, "total_tokens": 3, "completion_tokens": 1},
}


def text_chunk(text: str) -> bytes:
    """Return one event of a completion's stream as vLLM writes it."""
    fields = {**TEXT_COMPLETION, "choices": [{"index": 0, "text": text}], "usage": None}
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


TEXT_USAGE = b"data: " + json.dumps({**TEXT_COMPLETION, "choices": []}).encode() + b"\n\n"
TEXT_STREAM = [text_chunk("Ein "), text_chunk("Hund"), TEXT_USAGE, DONE]
RESPONSE = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1790000000,
    "model": "llava",
    "status": "completed",
    "output": [
        {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "Hund", "annotations": []}],
        }
    ],
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
}


def response_event(kind: str, **fields: Any) -> bytes:
    """Return one event of a response's stream as vLLM writes it."""
    return f"event: {kind}\ndata: {json.dumps({**fields, 'type': kind})}\n\n".encode()


_PLACE = {"item_id": "msg_1", "output_index": 0, "content_index": 0, "logprobs": []}
RESPONSE_STREAM = [
    response_event("response.created", response={**RESPONSE, "status": "in_progress", "output": []}, sequence_number=0),
    response_event("response.output_text.delta", delta="Ein ", sequence_number=1, **_PLACE),
    response_event("response.output_text.delta", delta="Hund", sequence_number=2, **_PLACE),
    response_event("response.completed", response=RESPONSE, sequence_number=3),
]


@dataclass
class EngineDouble:
    """The engine double. Tests set its behaviour, and read the requests that it received."""

    models: list[str] = field(default_factory=lambda: ["llava"])
    profile: Any = None
    """What it tells of itself; None for an engine without the plugin."""
    metrics: str = ""
    """What it exports on `/metrics`."""
    prompt_tokens: int = 20
    """What it counts in a prompt without videos."""
    healthy: bool = True
    listing_status: int = 200
    """The status of its answer to `/v1/models`."""
    headers: dict[str, str] = field(default_factory=lambda: dict(SAVED))
    completion: bytes = field(default_factory=lambda: json.dumps(COMPLETION, ensure_ascii=False).encode())
    pieces: list[bytes] = field(default_factory=lambda: [ROLE, *TEXT, USAGE, DONE])
    response_pieces: list[bytes] = field(default_factory=lambda: list(RESPONSE_STREAM))
    first_pieces: list[bytes] | None = None
    """What it streams the first time, instead of `pieces`."""
    error: tuple[int, bytes, str] | None = None
    errors_left: int | None = None
    """How many more times it answers with `error`; None is always."""
    delay_seconds: float = 0.0
    gap_seconds: float = 0.0
    dies_after: int | None = None
    hold: asyncio.Event | None = None
    health_hold: asyncio.Event | None = None
    requests: list[dict[str, Any]] = field(default_factory=list)
    request_headers: list[dict[str, str]] = field(default_factory=list)
    aborted: asyncio.Event = field(default_factory=asyncio.Event)
    running: int = 0
    most_running: int = 0
    url: str = ""
    runner: web.AppRunner | None = None
    site: web.TCPSite | None = None
    """Its port. `await double.site.stop()` closes it and leaves the connections open, as a server that stops does."""

    @contextlib.asynccontextmanager
    async def serving(self, port: int = 0) -> AsyncIterator["EngineDouble"]:
        app = web.Application(client_max_size=2**30)
        app.router.add_get("/double", self._told)
        app.router.add_post("/double", self._tell)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/aot/engine", self._profile)
        app.router.add_post("/tokenize", self._tokenize)
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses"):
            app.router.add_post(path, self._generate)
        self.runner = runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.2)
        await runner.setup()
        self.site = web.TCPSite(runner, "127.0.0.1", port)
        await self.site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await runner.cleanup()

    async def _told(self, request: web.Request) -> web.Response:
        return web.json_response({"requests": len(self.requests), "running": self.running})

    async def _tell(self, request: web.Request) -> web.Response:
        orders = await request.json()
        if orders.pop("forget", False):
            self.requests.clear()
        if (holding := orders.pop("holding", None)) is not None:
            if self.hold is not None:
                self.hold.set()
            self.hold = asyncio.Event() if holding else None
        for name, value in orders.items():
            if name == "error" and value is not None:
                value = (value[0], value[1].encode(), value[2])
            setattr(self, name, value)
        return web.json_response({})

    async def _health(self, request: web.Request) -> web.Response:
        if self.health_hold is not None:
            await self.health_hold.wait()
        return web.Response(status=200 if self.healthy else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=self.metrics)

    async def _models(self, request: web.Request) -> web.Response:
        cards = [{"id": m, "object": "model", "root": "/secret/path", "max_model_len": 4096} for m in self.models]
        return web.json_response({"object": "list", "data": cards}, status=self.listing_status)

    async def _profile(self, request: web.Request) -> web.Response:
        return web.json_response(self.profile, status=404 if self.profile is None else 200)

    async def _tokenize(self, request: web.Request) -> web.Response:
        self.requests.append(json.loads(await request.read()))
        if self.error is not None:
            status, body, content_type = self.error
            return web.Response(status=status, body=body, content_type=content_type)
        return web.json_response({"count": self.prompt_tokens, "max_model_len": 4096, "tokens": []})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            self.request_headers.append({name.lower(): value for name, value in request.headers.items()})
            asked = json.loads(await request.read())
            self.requests.append(asked)
            await asyncio.sleep(self.delay_seconds)
            if self.hold is not None and not asked.get("stream"):
                await self.hold.wait()
            if self.error is not None and self.errors_left != 0:
                self.errors_left = None if self.errors_left is None else self.errors_left - 1
                status, body, content_type = self.error
                return web.Response(status=status, body=body, content_type=content_type)
            if asked.get("stream"):
                return await self._stream(request)
            if self.dies_after is not None:
                request.transport.abort()
            return web.Response(
                body=self._whole(request), content_type="application/json", headers=self._headers(request)
            )
        except asyncio.CancelledError:
            self.aborted.set()
            raise
        finally:
            self.running -= 1

    def _headers(self, request: web.Request) -> dict[str, str]:
        about_video = b'"video_url"' in json.dumps(self.requests[-1]).encode()
        counts = request.path == "/v1/chat/completions" or (request.path == "/v1/responses" and about_video)
        return self.headers if counts else {}

    def _whole(self, request: web.Request) -> bytes:
        texts = {"/v1/completions": TEXT_COMPLETION, "/v1/responses": RESPONSE}
        return json.dumps(texts[request.path]).encode() if request.path in texts else self.completion

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        headers = {"content-type": "text/event-stream; charset=utf-8", **self._headers(request)}
        answer = web.StreamResponse(headers=headers)
        await answer.prepare(request)
        streams = {"/v1/completions": TEXT_STREAM, "/v1/responses": self.response_pieces}
        chat, self.first_pieces = self.first_pieces or self.pieces, None
        for i, piece in enumerate(streams.get(request.path, chat)):
            if i == self.dies_after:
                await asyncio.sleep(0.05)
                request.transport.abort()
                return answer
            await answer.write(piece)
            await asyncio.sleep(self.gap_seconds)
            if self.hold is not None and i == 1:
                await self.hold.wait()
        await answer.write_eof()
        return answer


async def main(port: int) -> None:
    async with EngineDouble().serving(port):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
