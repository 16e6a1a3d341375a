"""Test fixtures: the gateway in several set-ups, and the requests that tests send to it."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from server.app import create_app
from server.settings import Settings
from tests.server.engine_double import EngineDouble

ROOT = Path(__file__).resolve().parents[2]


async def until(condition):
    """Wait until `condition()` is true, at most ten seconds."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - other objects change it, some of them in other threads
            await asyncio.sleep(0.01)


async def until_true(asked):
    """Wait until `await asked()` is true, at most ten seconds."""
    async with asyncio.timeout(10):
        while not await asked():  # noqa: ASYNC110 - the answer comes from another process or over HTTP
            await asyncio.sleep(0.02)


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
    """The gateway under uvicorn, in a thread. Yields its base URL."""
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


class Process:
    """A server in a process of its own. It listens on `port` when the block begins, and is killed when it ends."""

    def __init__(self, *arguments, port=None, environment=None):
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", *(a.format(port=self.port) for a in arguments)],
            cwd=ROOT,
            env={key: value.format(port=self.port) for key, value in (environment or {}).items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    async def __aenter__(self):
        async with asyncio.timeout(20):
            while True:
                assert self.process.poll() is None, self.process.stdout.read()
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                        return self
                await asyncio.sleep(0.05)

    async def __aexit__(self, *_):
        await self.kill()
        self.process.stdout.close()

    async def kill(self):
        self.process.kill()
        await asyncio.to_thread(self.process.wait)

    async def ended(self):
        code = await asyncio.to_thread(self.process.wait, 10)
        return code, self.process.stdout.read()


class GatewayProcess(Process):
    """`python -m server`, as operators run it."""

    def __init__(self, *engine_urls, environment=None, **settings):
        settings = {"PORT": "{port}", "ENGINES": ",".join(engine_urls), "ENGINE_HEALTH_SECONDS": "0.2", **settings}
        ours = {f"AOT_GATEWAY_{name}": value for name, value in settings.items()}
        super().__init__("server", environment={**ours, **(environment or {})})

    def drain(self):
        self.process.send_signal(signal.SIGTERM)

    def children(self):
        return children(self.process.pid)

    async def metric(self, name, **labels):
        """The sum over all samples with these labels."""
        async with httpx.AsyncClient() as client:
            text = (await client.get(f"{self.url}/metrics")).text
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
        return sum(s.value for s in samples if s.name == f"aot_gateway_{name}" and labels.items() <= s.labels.items())


class EngineProcess(Process):
    """The engine double in a process of its own."""

    def __init__(self, port=None):
        super().__init__("tests.server.engine_double", "{port}", port=port, environment={"PATH": os.environ["PATH"]})

    async def tell(self, **orders):
        async with httpx.AsyncClient() as client:
            (await client.post(f"{self.url}/double", json=orders)).raise_for_status()

    async def told(self):
        async with httpx.AsyncClient() as client:
            return (await client.get(f"{self.url}/double")).json()


def value(client, name, **labels):
    return client.registry.get_sample_value(f"aot_gateway_{name}", labels)


def error_of(answer: httpx.Response):
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert isinstance(error["code"], str | None)
    assert answer.headers["x-request-id"]
    assert float(answer.headers["x-aot-gateway-overhead-ms"]) >= 0
    return error


def ask(**fields):
    """A chat request with text only."""
    return {"model": "llava", "messages": [{"role": "user", "content": "What happens?"}], **fields}


def ask_about(url: str, **fields):
    """A chat request about a video."""
    parts = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": "What happens?"}]
    return {"model": "llava", "messages": [{"role": "user", "content": parts}], **fields}


CHAT = "/v1/chat/completions"
