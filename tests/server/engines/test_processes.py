"""A gateway process in front of several engine processes, some of which die, hang or come back."""

import asyncio
import json
import time
from contextlib import AsyncExitStack

import httpx
import pytest

from server.engines.breaker import FAILURES_TO_OPEN
from tests.server.clips import clip, data_url
from tests.server.engine_double import DONE, ROLE, TEXT
from tests.server.harness import CHAT, EngineProcess, GatewayProcess, ask, ask_about, until_true

STREAM = b"".join([ROLE, *TEXT, DONE])


@pytest.fixture
async def client():
    async with httpx.AsyncClient(timeout=20, limits=httpx.Limits(max_connections=None)) as client:
        yield client


def video(number):
    return data_url(clip(frames=6 + number))


async def test_one_video_stays_on_one_engine_until_that_one_has_its_share(client):
    async with AsyncExitStack() as stack:
        engines = await asyncio.gather(*(stack.enter_async_context(EngineProcess()) for _ in range(3)))
        gateway = await stack.enter_async_context(GatewayProcess(*(engine.url for engine in engines)))

        async def post(body):
            answer = await client.post(gateway.url + CHAT, json=body)
            assert answer.status_code == 200, answer.text

        for _ in range(10):
            await post(ask_about(video(0)))
        counts = [(await engine.told())["requests"] for engine in engines]
        assert sorted(counts) == [0, 0, 10]
        assert await gateway.metric("affinity_total", outcome="hit") == 10

        for number in range(10):
            await post(ask_about(video(number)))
        assert sum([(await engine.told())["requests"] > 0 for engine in engines]) > 1  # by chance false once in 20,000
        assert await gateway.metric("affinity_total", outcome="hit") == 20

        for _ in range(3):
            await post(ask())
        assert await gateway.metric("affinity_total", outcome="none") == 3

        for engine in engines:
            await engine.tell(holding=True)
        asking = [asyncio.create_task(post(ask_about(video(0)))) for _ in range(12)]

        async def running():
            return [(await engine.told())["running"] for engine in engines]

        await until_true(lambda: _is(_sum(running()), 12))
        assert max(await running()) == 5  # 1.25 * 12 / 3
        for engine in engines:
            await engine.tell(holding=False)
        await asyncio.gather(*asking)
        assert await gateway.metric("affinity_total", outcome="spilled") == 12 - 5


async def test_an_engine_killed_in_its_streams_ends_them_with_an_error_and_gets_nothing_until_it_is_back(client):
    async with (
        EngineProcess() as first,
        EngineProcess() as second,
        GatewayProcess(first.url, second.url) as gateway,
    ):
        await asyncio.gather(*(engine.tell(gap_seconds=0.3) for engine in (first, second)))

        async def read(arrived):
            async with client.stream("POST", gateway.url + CHAT, json=ask(stream=True)) as answer:
                got = b""
                async for piece in answer.aiter_raw():
                    arrived.set()
                    got += piece
                return got

        arrived = [asyncio.Event() for _ in range(6)]
        streams = [asyncio.create_task(read(event)) for event in arrived]
        await asyncio.gather(*(event.wait() for event in arrived))
        await first.kill()
        answers = await asyncio.gather(*streams)
        whole = [got for got in answers if got == STREAM]
        broken = [got for got in answers if got != STREAM]
        assert len(whole) == len(broken) == 3
        for got in broken:
            assert STREAM.startswith(got[: got.rindex(b"data: ")])
            assert json.loads(got.rpartition(b"data: ")[2])["error"]["code"] == "engine_failed"
        await second.tell(gap_seconds=0, forget=True)
        for _ in range(4):
            assert (await client.post(gateway.url + CHAT, json=ask())).status_code == 200
        assert (await second.told())["requests"] == 4

        async with EngineProcess(port=first.port) as restarted:
            await until_true(lambda: _is(gateway.metric("engine_up", engine="engine-0"), 1))
            for _ in range(4):
                assert (await client.post(gateway.url + CHAT, json=ask())).status_code == 200
            assert (await restarted.told())["requests"] == 2


async def _is(value, expected):
    return await value == expected


async def _sum(values):
    return sum(await values)


async def test_an_engine_that_never_answers_times_out_and_is_left_alone_until_a_trial_succeeds(client):
    async with (
        EngineProcess() as engine,
        GatewayProcess(engine.url, ENGINE_HEADERS_SECONDS="0.2", ENGINE_READ_SECONDS="30") as gateway,
    ):
        await engine.tell(delay_seconds=3600)
        timeouts = 0
        while (answer := await client.post(gateway.url + CHAT, json=ask(stream=True))).status_code == 504:
            timeouts += 1
            assert answer.json()["error"]["code"] == "engine_timeout"
            assert answer.headers["x-should-retry"] == "false"
        assert timeouts >= FAILURES_TO_OPEN  # more on a slow machine, where trials come in between
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert (await engine.told())["requests"] == timeouts
        assert await gateway.metric("engine_up") == 1  # the health checks still pass
        assert await gateway.metric("engine_breaker_open", engine="engine-0") == 1

        await engine.tell(delay_seconds=0)

        async def answers():
            return (await client.post(gateway.url + CHAT, json=ask(stream=True))).status_code == 200

        await until_true(answers)
        assert await gateway.metric("engine_breaker_open") == 0
        gateway.drain()
        _, output = await gateway.ended()
    events = [json.loads(line)["event"] for line in output.splitlines()]
    assert events.count("engine keeps failing") == timeouts - FAILURES_TO_OPEN + 1
    assert events.count("engine answers again") == 1


async def test_a_slow_engine_is_passed_over_for_text_and_nothing_is_lost(client):
    async with (
        EngineProcess() as slow,
        EngineProcess() as fast,
        GatewayProcess(slow.url, fast.url, MAX_CONCURRENCY="4") as gateway,
    ):
        await slow.tell(holding=True)
        asking = [asyncio.create_task(client.post(gateway.url + CHAT, json=ask())) for _ in range(40)]
        await until_true(lambda: _is(_count(slow, fast), 40))
        assert (await slow.told())["requests"] <= 2  # half of the four in flight: it holds all it gets
        await slow.tell(holding=False)
        assert {answer.status_code for answer in await asyncio.gather(*asking)} == {200}


async def _count(*engines):
    return sum([(await engine.told())["requests"] for engine in engines])


async def test_no_stream_is_cut_when_the_gateway_is_told_to_end_under_load(client):
    async with EngineProcess() as engine, GatewayProcess(engine.url, MAX_CONCURRENCY="10") as gateway:
        await engine.tell(gap_seconds=0.1)
        told = asyncio.Event()
        cut, finished, turned_away = [], 0, 0

        async def one_after_another():
            nonlocal finished, turned_away
            while True:
                status, got = None, b""
                try:
                    async with client.stream("POST", gateway.url + CHAT, json=ask(stream=True)) as answer:
                        status = answer.status_code
                        async for piece in answer.aiter_raw():
                            got += piece
                except httpx.TransportError as exc:  # allowed only before an answer began: the gateway has ended
                    if status is not None or not told.is_set():
                        cut.append((status, got, repr(exc)))
                if status is None or status == 503:
                    turned_away += 1
                    return
                finished += 1
                if got != STREAM:
                    cut.append((status, got))

        clients = [asyncio.create_task(one_after_another()) for _ in range(20)]  # half of them wait in the queue
        await asyncio.sleep(1.5)
        told.set()
        begin = time.monotonic()
        gateway.drain()
        await asyncio.gather(*clients)
        code, output = await gateway.ended()
        assert code == 0, output
        assert cut == []
        assert finished >= 20
        assert turned_away == 20
        assert time.monotonic() - begin < 10
