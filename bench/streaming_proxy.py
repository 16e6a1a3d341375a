"""The baseline of the gateway benchmark: a minimal proxy of FastAPI and aiohttp, bytes in, bytes out.

    python bench/streaming_proxy.py PORT ENGINE_URL

It checks, counts and routes nothing. The overhead of a gateway beyond this baseline is the cost of its work.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse


def proxy(engine: str) -> FastAPI:
    """Return the application in front of one engine."""

    @asynccontextmanager
    async def session(app: FastAPI) -> AsyncIterator[None]:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None), auto_decompress=False) as client:
            app.state.client = client
            yield

    app = FastAPI(lifespan=session)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> StreamingResponse:
        headers = {"content-type": "application/json", "content-length": request.headers["content-length"]}
        answer = await app.state.client.post(f"{engine}{request.url.path}", data=request.stream(), headers=headers)

        async def pieces() -> AsyncIterator[bytes]:
            async with answer:
                async for piece in answer.content.iter_any():
                    yield piece

        return StreamingResponse(pieces(), answer.status, media_type=answer.content_type)

    return app


if __name__ == "__main__":
    uvicorn.run(
        proxy(sys.argv[2]),
        host="127.0.0.1",
        port=int(sys.argv[1]),
        log_level="warning",
        access_log=False,
        loop="uvloop",
    )
