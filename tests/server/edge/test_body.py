import asyncio
import contextlib
import gzip
import json

import httpx
import pytest

from server.settings import Settings
from tests.server.harness import CHAT, ask, error_of, gateway, served, value


async def test_a_body_with_a_large_length_is_refused_unread(engine):
    async with gateway(engine, max_body_bytes=2000) as client:
        answer = await client.post(CHAT, json=ask(user="x" * 3000))
        assert answer.status_code == 413
        assert error_of(answer)["code"] == "request_too_large"
        assert value(client, "rejections_total", reason="body_too_large") == 1
    assert engine.requests == []


async def test_a_large_body_without_a_length_is_refused_while_it_is_read(engine):
    taken = 0

    async def pieces():
        nonlocal taken
        for _ in range(1000):
            taken += 1
            yield b" " * 1000

    async with gateway(engine, max_body_bytes=2000) as client:
        answer = await client.post(CHAT, content=pieces())
    assert answer.status_code == 413
    assert taken < 10


async def test_a_body_that_does_not_arrive_times_out(engine):
    async def pieces():
        yield b"{"
        await asyncio.sleep(30)

    async with gateway(engine, body_seconds=0.2) as client:
        answer = await client.post(CHAT, content=pieces())
    assert answer.status_code == 408
    assert error_of(answer)["code"] == "request_timeout"


async def test_a_large_body_reaches_the_engine_whole(engine):
    engine.headers = {}
    text = "ä" * (3 * 2**20)
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask(note=text))
    assert answer.status_code == 200
    assert engine.requests == [ask(note=text)]
    assert "transfer-encoding" not in engine.request_headers[0]


@pytest.mark.parametrize("encoding", ["gzip", "br", "zstd", "deflate, gzip"])
async def test_a_body_is_never_unpacked(engine, encoding):
    async with gateway(engine) as client:
        for body in (gzip.compress(b" " * 2**25), gzip.compress(json.dumps(ask()).encode())):
            answer = await client.post(CHAT, content=body, headers={"content-encoding": encoding})
            assert answer.status_code == 400
            assert "not valid JSON" in error_of(answer)["message"]
    assert engine.requests == []


BODY = json.dumps(ask()).encode()


async def test_lengths_that_contradict_each_other_smuggle_no_request(engine):
    hidden = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(BODY), BODY)
    async with served(Settings(engines=(engine.url,)), http="httptools") as url:
        for headers in (
            b"content-length: 4\r\ntransfer-encoding: chunked",
            b"transfer-encoding: chunked\r\ncontent-length: 4",
            b"content-length: 4\r\ncontent-length: 5",
            b"content-length: -4",
            b"content-length: 4, 4",
            b"transfer-encoding: xchunked",
            b"transfer-encoding: chunked, identity",
        ):
            host, port = url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"GET /health/live HTTP/1.1\r\nhost: x\r\n" + headers + b"\r\n\r\n0\r\n\r\n" + hidden)
            with contextlib.suppress(TimeoutError, ConnectionError):
                await asyncio.wait_for(reader.read(), 0.5)
            writer.close()
        async with httpx.AsyncClient() as client:
            assert (await client.post(url + CHAT, content=BODY)).status_code == 200
    assert len(engine.requests) == 1
