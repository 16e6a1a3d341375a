import asyncio
from contextlib import ExitStack

import pytest
from prometheus_client import CollectorRegistry

from server.admission.gate import Gate
from server.errors import Overloaded, answer_to
from server.observe.metrics import Metrics
from tests.server.harness import CHAT, ask, error_of, gateway, until, value


async def test_the_queue_is_bounded_and_concurrency_to_the_engine_too(engine):
    engine.hold = asyncio.Event()
    async with gateway(engine, max_concurrency=2, max_queue=1) as client:
        running = [asyncio.create_task(client.post(CHAT, json=ask())) for _ in range(3)]
        await until(lambda: engine.running == 2 and value(client, "queue_depth") == 1)
        assert value(client, "inflight_requests") == 3
        refused = await client.post(CHAT, json=ask())
        assert refused.status_code == 429
        assert error_of(refused)["code"] == "rate_limit_exceeded"
        assert int(refused.headers["retry-after"]) >= 1
        engine.hold.set()
        assert [answer.status_code for answer in await asyncio.gather(*running)] == [200, 200, 200]
        assert value(client, "queue_depth") == value(client, "inflight_requests") == 0
        assert value(client, "rejections_total", reason="queue_full") == 1
    assert engine.most_running == 2


async def test_a_client_that_leaves_the_queue_gives_its_place_back(engine):
    engine.hold = asyncio.Event()
    async with gateway(engine, max_concurrency=1, max_queue=1) as client:
        first = asyncio.create_task(client.post(CHAT, json=ask()))
        second = asyncio.create_task(client.post(CHAT, json=ask()))
        await until(lambda: value(client, "queue_depth"))
        second.cancel()
        await until(lambda: not value(client, "queue_depth"))
        third = asyncio.create_task(client.post(CHAT, json=ask()))
        await asyncio.sleep(0.05)
        engine.hold.set()
        assert (await first).status_code == (await third).status_code == 200
    assert len(engine.requests) == 2


async def test_who_waits_too_long_is_told_when_to_come_back(engine):
    engine.hold = asyncio.Event()
    async with gateway(engine, max_concurrency=1, max_queue=5, queue_seconds=0.2) as client:
        first = asyncio.create_task(client.post(CHAT, json=ask()))
        await until(lambda: engine.running)
        refused = await client.post(CHAT, json=ask())
        assert refused.status_code == 429
        assert error_of(refused)["code"] == "rate_limit_exceeded"
        assert "within 0.2 seconds" in error_of(refused)["message"]
        assert int(refused.headers["retry-after"]) >= 1
        assert value(client, "queue_depth") == 0
        engine.hold.set()
        assert (await first).status_code == 200
        assert (await client.post(CHAT, json=ask())).status_code == 200
    assert len(engine.requests) == 2


async def test_who_came_first_is_let_through_first():
    gate = Gate(max_concurrency=2, max_queue=20, queue_seconds=60, metrics=Metrics(CollectorRegistry()))
    order = []

    async def one(number):
        async with gate.engine_slot():
            order.append(number)
            await asyncio.sleep(0)

    waiting = [asyncio.create_task(one(number)) for number in range(10)]
    await asyncio.sleep(0)
    waiting[4].cancel()
    await asyncio.wait(waiting)
    assert order == [0, 1, 2, 3, 5, 6, 7, 8, 9]


async def test_the_advised_wait_grows_with_how_long_requests_take_and_how_many_are_in_line():
    async def advised(slot_seconds, max_queue):
        gate = Gate(max_concurrency=2, max_queue=max_queue, queue_seconds=60, metrics=Metrics(CollectorRegistry()))
        gate._slot_seconds = slot_seconds
        with ExitStack() as stack:
            for _ in range(max_queue + 2):
                stack.enter_context(gate.admitted())
            with pytest.raises(Overloaded) as refused:
                stack.enter_context(gate.admitted())
        return int(answer_to(refused.value).headers["retry-after"])

    assert await advised(slot_seconds=0.01, max_queue=4) == 1
    assert await advised(slot_seconds=3, max_queue=4) == 6
    assert await advised(slot_seconds=3, max_queue=8) == 12
    assert await advised(slot_seconds=300, max_queue=8) == 60


async def test_the_gate_learns_how_long_requests_take():
    gate = Gate(max_concurrency=1, max_queue=0, queue_seconds=60, metrics=Metrics(CollectorRegistry()))
    for _ in range(30):
        async with gate.engine_slot():
            pass
    assert gate._slot_seconds < 0.05  # the average starts at one second
