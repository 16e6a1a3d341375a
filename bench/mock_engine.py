"""An engine that answers at once, in vLLM's wire format, without computing anything.

python bench/mock_engine.py PORT SECONDS_BETWEEN_CHUNKS
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

from aiohttp import web

ANSWER = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1790000000,
    "model": "bench",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "A dog runs."}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 640, "completion_tokens": 4, "total_tokens": 644},
}
WHOLE = json.dumps(ANSWER).encode()
SAVED = {
    "x-aot-video-tokens-before": "6272",
    "x-aot-video-tokens-after": "627",
    "x-aot-video-retention": "0.1",
}
CHUNKS = 100


def event(content: str, finish: str | None = None) -> bytes:
    """Return a chunk of a stream."""
    choice = {"index": 0, "delta": {"content": content}, "finish_reason": finish}
    fields = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1790000000, "model": "bench"}
    return b"data: " + json.dumps({**fields, "choices": [choice]}).encode() + b"\n\n"


async def chat(request: web.Request) -> web.StreamResponse:
    """Read an entire request, then answer. Each chunk of a stream contains the time at which it was sent."""
    body = await request.read()
    if b'"stream":true' not in (body[:4096] + body[-4096:]).replace(b" ", b""):
        return web.Response(body=WHOLE, content_type="application/json", headers=SAVED)
    answer = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8", **SAVED})
    await answer.prepare(request)
    for index in range(CHUNKS):
        await answer.write(event(f"{time.perf_counter():.7f}", "stop" if index == CHUNKS - 1 else None))
        await asyncio.sleep(request.app["gap"])
    await answer.write(b"data: [DONE]\n\n")
    await answer.write_eof()
    return answer


def main(port: int, gap_seconds: float) -> None:
    """Serve on loopback until told to stop."""
    app = web.Application(client_max_size=2**30)
    app["gap"] = gap_seconds
    app.router.add_get("/health", lambda _: _ok())
    app.router.add_get("/v1/models", lambda _: _models())
    app.router.add_post("/v1/chat/completions", chat)
    web.run_app(app, host="127.0.0.1", port=port, print=None, access_log=None)


async def _ok() -> web.Response:
    return web.Response()


async def _models() -> web.Response:
    return web.json_response({"object": "list", "data": [{"id": "bench", "object": "model", "max_model_len": 8192}]})


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
