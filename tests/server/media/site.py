"""A gateway under uvicorn in a thread, with an engine and media hosts, to attack and then to check for leaks."""

import asyncio
import contextlib
import os
import tempfile
import threading
import time
from pathlib import Path

import httpx
import uvicorn
from prometheus_client import CollectorRegistry

from server.app import create_app
from server.engines import session
from server.settings import Settings
from tests.server.clips import clip
from tests.server.engine_double import SAVED, EngineDouble
from tests.server.harness import CHAT, ask_about, children, free_port
from tests.server.media.hosts import PUBLIC, Internet


class EvilHost:
    """A malicious media host. The path of a request selects the answer: fixed bytes, or a coroutine that writes it."""

    def __init__(self):
        self.answers = {}
        self.asked = []

    async def serve(self):
        self.server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]

    async def _answer(self, reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            path = head.split()[1].decode()
            self.asked.append(path)
            answer = self.answers[path]
            if isinstance(answer, bytes):
                writer.write(answer)
                await writer.drain()
            else:
                answering, leaving = asyncio.ensure_future(answer(writer)), asyncio.ensure_future(reader.read())
                await asyncio.wait([answering, leaving], return_when=asyncio.FIRST_COMPLETED)
                for task in (answering, leaving):
                    task.cancel()
                await asyncio.gather(answering, leaving, return_exceptions=True)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def response(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", *(headers or (f"content-length: {len(body)}",)), "", ""]
    return "\r\n".join(lines).encode() + body


class Site:
    """The gateway and its surroundings, running until the block ends. It may be used from any thread."""

    def __init__(self, directory: Path, **settings):
        self.temporary, self.store = directory / "temporary", directory / "store"
        self.settings = settings
        self.engine = EngineDouble(headers={**SAVED, "connection": "close"})
        self.internet = Internet()
        self.host = EvilHost()
        self.started = threading.Event()
        self.served = 0

    def __enter__(self):
        for folder in (self.temporary, self.store):
            folder.mkdir()
        self.patches = [(tempfile, "tempdir", str(self.temporary)), (session, "KEEPALIVE_SECONDS", 0.1)]
        self.patches = [(module, name, getattr(module, name), value) for module, name, value in self.patches]
        for module, name, _, value in self.patches:
            setattr(module, name, value)
        self.thread = threading.Thread(target=asyncio.run, args=[self._run()])
        self.thread.start()
        assert self.started.wait(20)
        self.baseline = None
        self.still_serves()
        time.sleep(0.5)  # until the connection of the first health check is closed
        self.baseline = self.footprint()
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(20)
        for module, name, value, _ in self.patches:
            setattr(module, name, value)
        assert not self.thread.is_alive()

    async def _run(self):
        self.loop = asyncio.get_running_loop()
        await self.host.serve()
        for port in (80, 443):
            self.internet.route(PUBLIC, port, self.host)
        async with self.engine.serving():
            settings = Settings(
                engines=(self.engine.url,), engine_health_seconds=3600, media_allow_http=True, **self.settings
            )
            app = create_app(settings, registry=CollectorRegistry(), network=self.internet.network)
            port = free_port()
            self.url = f"http://127.0.0.1:{port}"
            self.server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", port, log_config=None, ws="none"))
            serving = asyncio.create_task(self.server.serve())
            while not self.server.started:  # noqa: ASYNC110 - uvicorn has no event for it
                await asyncio.sleep(0.01)
            self.started.set()
            await serving
        self.host.server.close()

    def ask(self, url, **fields):
        return self.post(ask_about(url, **fields))

    def post(self, request):
        return httpx.post(self.url + CHAT, json=request, timeout=20, headers={"connection": "close"})

    def footprint(self):
        """The resources in use: the gateway's tasks, file descriptors except the workers' sockets, temporary files."""
        tasks = [task.get_coro() for task in asyncio.all_tasks(self.loop)]
        code = [coroutine.cr_code for coroutine in tasks if hasattr(coroutine, "cr_code")]
        workers = children(os.getpid())
        assert len(workers) <= (os.cpu_count() or 1)
        return {
            "tasks": sorted(
                c.co_qualname for c in code if "/server/" in c.co_filename and "/tests/" not in c.co_filename
            ),
            "descriptors": len(os.listdir("/proc/self/fd")) - len(workers),
            "temporary": sorted(os.listdir(self.temporary)),
        }

    def still_serves(self):
        """Check that a request about a new video is answered, and that no more resources are in use than before."""
        self.served += 1
        self.host.answers["/clip.mp4"] = response(clip() + b"\0\0\0\x0cfree" + self.served.to_bytes(4, "big"))
        answer = self.ask("http://media.example/clip.mp4")
        assert answer.status_code == 200, answer.text
        deadline = time.monotonic() + 10
        while self.baseline is not None and exceeds(now := self.footprint(), self.baseline):
            assert time.monotonic() < deadline, f"{now} is more than {self.baseline}"
            time.sleep(0.05)


def exceeds(now, baseline):
    """Return whether more is in use than before. Descriptors of earlier tests in this process may have been closed."""
    return now["descriptors"] > baseline["descriptors"] or any(
        now[name] != baseline[name] for name in ("tasks", "temporary")
    )
