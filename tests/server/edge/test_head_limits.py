"""The limits on everything that a client sends before its request's body, and so before its key is checked."""

import asyncio

import httpx
import pytest

from tests.server.harness import CHAT, GatewayProcess, ask

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
PIECE = b"x" * 65536


@pytest.fixture
async def gateway(engine):
    async with GatewayProcess(engine.url, BODY_SECONDS="1") as gateway:
        yield gateway


async def sent(gateway, first, again, *, pause=0.0, most=1000):
    """Send until the gateway closes the connection; return its answer, and how many bytes it accepted."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    taken = 0

    async def send():
        nonlocal taken
        writer.write(first)
        for _ in range(most):
            writer.write(again)
            await writer.drain()
            taken += len(again)
            await asyncio.sleep(pause)

    sending = asyncio.create_task(send())
    answer = b""
    try:
        async with asyncio.timeout(10):
            while piece := await reader.read(65536):
                answer += piece
    except ConnectionError:
        pass
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    writer.close()
    return answer, taken


ENDLESS = [
    (b"GET /", PIECE),
    (HEAD + b"x-filler: ", PIECE),
    (HEAD, b"x-filler: " + b"x" * 1000 + b"\r\n"),
    (HEAD + b"x" * 10, PIECE),
    (b"", b"\r\n" * 1000),
    (CHUNKED + b"1;a=", PIECE),
    (CHUNKED + b"1\r\nx\r\n0\r\nx-filler: ", PIECE),
    (CHUNKED + b"1\r\nx\r\n0\r\n", b"x-filler: " + b"x" * 1000 + b"\r\n"),
]


async def test_what_is_no_body_is_not_kept_without_end(gateway):
    for first, again in ENDLESS:
        answer, taken = await sent(gateway, first, again, most=200_000_000 // len(again))
        assert b" 200 " not in answer
        assert taken < 50_000_000, first  # not exact, because sockets buffer megabytes
    async with httpx.AsyncClient() as client:
        assert (await client.post(gateway.url + CHAT, json=ask())).status_code == 200


async def test_a_head_that_does_not_come_is_not_waited_for(gateway):
    for first, again in ((b"", b""), (HEAD, b"x: y\r\n"), (b"P", b""), (b"", b"\r\n")):
        answer, _ = await sent(gateway, first, again, pause=0.05)
        assert answer.startswith(b"HTTP/1.1 408 "), first
    whole = HEAD + b"content-length: 2\r\n\r\n{}"
    answer, _ = await sent(gateway, whole + HEAD, b"x: y\r\n", pause=0.05)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.endswith(b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")


async def test_connections_wait_for_their_next_request_and_large_heads_and_bodies_pass(gateway):
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=1)) as client:
        for pause in (0, 1.5):
            await asyncio.sleep(pause)
            headers = {f"x-{number}": "x" * 1000 for number in range(50)}
            answer = await client.post(gateway.url + CHAT, json=ask(note="x" * 10**6), headers=headers)
            assert answer.status_code == 200


async def test_an_answer_under_way_is_not_cut_by_the_time_for_heads(gateway, engine):
    engine.delay_seconds = 1.5
    async with httpx.AsyncClient() as client:
        assert (await client.post(gateway.url + CHAT, json=ask())).status_code == 200
