import asyncio

from tests.server.harness import CHAT, ask, error_of, gateway, value


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
