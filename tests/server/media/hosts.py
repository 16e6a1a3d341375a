"""Media hosts on loopback, and a network on which they have public addresses. The network reaches nothing else."""

import asyncio
import contextlib
import socket

from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult

from server.media.fetch import Network
from tests.server.clips import clip, picture, sound

PUBLIC = "9.9.9.9"


class Names(AbstractResolver):
    """A resolver with fixed answers. If a name has a tuple of answers, each look-up gets the next one."""

    def __init__(self):
        self.answers = {"media.example": [PUBLIC]}
        self.asked = []

    async def resolve(self, host, port=0, family=socket.AF_UNSPEC):
        self.asked.append(host)
        addresses = self.answers.get(host)
        if isinstance(addresses, tuple):
            addresses = addresses[min(self.asked.count(host), len(addresses)) - 1]
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return [ResolveResult(hostname=host, host=a, port=port, family=0, proto=0, flags=0) for a in addresses]

    async def close(self):
        pass


class Internet:
    """The network below the rule about addresses. It records each address dialled, and connects to loopback only."""

    def __init__(self):
        self.names = Names()
        self.routes = {}
        self.dialled = []
        self.network = Network(self.names, self._new_socket)

    def route(self, address, port, host):
        """Route connections to a public address to `host`."""
        self.routes[address, port] = host

    def _new_socket(self, info):
        return _Rerouted(self, *info[:3])


class _Rerouted(socket.socket):
    def __init__(self, internet, *arguments):
        super().__init__(*arguments)
        self._internet = internet

    def connect(self, address):
        self._internet.dialled.append(address[:2])
        to = self._internet.routes.get(address[:2])
        if to is None:
            raise ConnectionRefusedError(111, f"nothing at {address[0]}")
        name = "::ffff:127.0.0.1" if self.family == socket.AF_INET6 else "127.0.0.1"
        super().connect((name, to.port))


class MediaHost:
    """A media host on loopback."""

    def __init__(self):
        self.files = {
            "/clip.mp4": clip(),
            "/clip.webm": clip("webm", "vp8"),
            "/a.png": picture(),
            "/a.wav": sound(),
        }
        self.redirects = {}
        self.asked = []
        self.asked_raw = []  # paths and queries, byte by byte
        self.hosts = []
        self.gate = None
        self.headers = {}
        self.status = 200
        self.left = 0

    @contextlib.asynccontextmanager
    async def serving(self, ssl_context=None):
        app = web.Application()
        app.router.add_get(r"/{path:[\s\S]*}", self._get)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.2)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=ssl_context).start()
        self.port = runner.addresses[0][1]
        self.host = f"127.0.0.1:{self.port}"
        self.url = f"http://{self.host}"
        try:
            yield self
        finally:
            await runner.cleanup()

    async def _get(self, request):
        self.asked.append(request.path)
        self.asked_raw.append(request.raw_path)
        self.hosts.append(request.headers["host"])
        if self.gate is not None:
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.left += 1
                raise
        if request.path in self.redirects:
            return web.Response(status=302, headers={"location": self.redirects[request.path]})
        if request.path not in self.files:
            return web.Response(status=404)
        body = self.files[request.path]
        return web.Response(status=self.status, body=body, content_type="text/html", headers=self.headers)
