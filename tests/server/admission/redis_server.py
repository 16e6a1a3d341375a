"""A Redis server for the tests, on a free loopback port. It writes nothing to disk."""

import socket
import subprocess
import time

from tests.programs import require
from tests.server.harness import free_port


class RedisServer:
    """A Redis server that can be stopped, and started again on the same port."""

    def __init__(self, directory):
        require("redis-server")
        self._directory = directory
        self._port = free_port()
        self.url = f"redis://127.0.0.1:{self._port}/0"
        self._process = None

    def start(self):
        options = ["--port", str(self._port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen(
            ["redis-server", *options, "--dir", str(self._directory)], stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 20
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self._port)) == 0:
                    return
            assert self._process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def stop(self):
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
