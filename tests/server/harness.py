"""The gateway set up for tests, and what tests send it."""

import asyncio
import contextlib
import socket
import threading
from pathlib import Path

import httpx
import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from server.app import create_app
from server.settings import Settings
from tests.server.engine_double import EngineDouble


async def until(condition):
    """Wait for what happens in the gateway or in the double, at most ten seconds."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - it lies in other objects, in part in other threads
            await asyncio.sleep(0.01)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.asynccontextmanager
async def gateway(engine: EngineDouble | None = None, *, network=None, **settings):
    """An HTTP client of the gateway's ASGI app, with `client.registry` to read metrics from."""
    if engine is not None:
        settings.setdefault("engines", (engine.url,))
    registry = CollectorRegistry()
    app = create_app(Settings(**settings), registry=registry, network=network)
    async with app.router.lifespan_context(app), client_of(app) as client:
        client.registry = registry
        yield client


def client_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway", timeout=20)


@contextlib.asynccontextmanager
async def served(settings: Settings, registry: CollectorRegistry | None = None, http: str = "auto"):
    """The gateway under uvicorn in a thread; gives its base URL."""
    port = free_port()
    app = create_app(settings, registry=registry or CollectorRegistry())
    config = uvicorn.Config(app, "127.0.0.1", port, http=http, log_config=None, ws="none", lifespan="on")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            await asyncio.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await asyncio.to_thread(thread.join, 10)


def children(pid: int) -> list[int]:
    """The ids of a process's child processes."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sorted(int(child) for thread in threads for child in (thread / "children").read_text().split())


def ask(**fields):
    """A chat request in text."""
    return {"model": "llava", "messages": [{"role": "user", "content": "What happens?"}], **fields}


def ask_about(url: str, **fields):
    """A chat request about a video."""
    parts = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": "What happens?"}]
    return {"model": "llava", "messages": [{"role": "user", "content": parts}], **fields}


CHAT = "/v1/chat/completions"
