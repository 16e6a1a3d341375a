"""A real engine is told to stop while it streams: no stream is left open, and none that was cut looks complete."""

import contextlib
import json
import os
import signal
import sys
import threading
import time

import httpx
import pytest

from demo.tiny_checkpoints import checkpoint
from tests.e2e.engines import free_port, process, serve_command
from tests.e2e.with_gateway.seen import metric, wait_until

pytestmark = [pytest.mark.any_runner, pytest.mark.slow]

STREAMS = 8
GONE_SECONDS = 5


@contextlib.contextmanager
def engine_and_gateway(folder, *arguments):
    """The process of an engine that leads a group of its own, and the address of a gateway in front of it."""
    port, gateway_port = free_port(), free_port()
    engine, gateway = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{gateway_port}"
    serve = ["setsid", *serve_command(checkpoint("tiny"), port, "--served-model-name=tiny", *arguments)]
    environment = {"AOT_GATEWAY_PORT": str(gateway_port), "AOT_GATEWAY_ENGINES": engine}
    with (
        process(serve, health=f"{engine}/health", log=folder / "engine") as started,
        process(
            [sys.executable, "-m", "server"],
            health=f"{gateway}/health/ready",
            log=folder / "gateway",
            environment=environment,
        ),
    ):
        yield started, gateway


class Stream(threading.Thread):
    """One stream through the gateway: the bytes that came, and when it ended."""

    def __init__(self, gateway, number, max_tokens):
        super().__init__()
        self.gateway = gateway
        messages = [{"role": "user", "content": f"Count to {number}"}]
        self.request = {"model": "tiny", "messages": messages, "stream": True, "ignore_eos": True}
        self.request["max_tokens"] = max_tokens
        self.got = b""
        self.ended = None

    def run(self):
        with (
            httpx.Client(timeout=None) as client,
            client.stream("POST", f"{self.gateway}/v1/chat/completions", json=self.request) as answer,
        ):
            for piece in answer.iter_raw():
                self.got += piece
        self.ended = time.monotonic()


def streams_in_full_flow(gateway, max_tokens):
    streams = [Stream(gateway, number, max_tokens) for number in range(STREAMS)]
    for stream in streams:
        stream.start()
    wait_until(lambda: all(stream.got.count(b"data: ") > 5 for stream in streams), seconds=60)
    return streams


def test_no_stream_is_left_open_and_none_that_was_cut_looks_complete(tmp_path):
    with engine_and_gateway(tmp_path) as (engine, gateway):
        streams = streams_in_full_flow(gateway, 8000)
        told = time.monotonic()
        os.killpg(engine.pid, signal.SIGTERM)
        for stream in streams:
            stream.join(60)
        assert max(stream.ended for stream in streams) - told < GONE_SECONDS
        for stream in streams:
            last = stream.got.rpartition(b"data: ")[2]
            assert json.loads(last)["error"]["code"] == "engine_failed"
            assert b"[DONE]" not in stream.got
        assert metric(gateway, "aot_gateway_rejections_total", reason="engine_failed") == STREAMS
        assert metric(gateway, "aot_gateway_rejections_total", reason="client_gone") == 0


def test_streams_that_an_engine_finishes_in_its_drain_go_on(tmp_path):
    with engine_and_gateway(tmp_path, "--shutdown-timeout=120") as (engine, gateway):
        streams = streams_in_full_flow(gateway, 40)
        engine.send_signal(signal.SIGTERM)
        for stream in streams:
            stream.join(120)
        assert all(stream.got.endswith(b"data: [DONE]\n\n") for stream in streams)
        assert all(b'"error"' not in stream.got for stream in streams)
