"""Many large requests at once take no more memory than the operator allows."""

import asyncio
import contextlib

import pytest
from prometheus_client import CollectorRegistry

from server.admission.buffers import FREE_BYTES, Buffers
from server.errors import Overloaded
from server.observe.metrics import Metrics
from tests.server.harness import CHAT, ask, error_of, gateway, until, value

BODY = 350_000
ROOM = {"max_buffered_bytes": 500_000, "max_body_bytes": 400_000, "media_max_bytes": 300_000}


def large(**fields):
    return ask(note="x" * BODY, **fields)


def refused(answer):
    assert answer.status_code == 429
    assert error_of(answer)["code"] == "rate_limit_exceeded"
    assert "memory for requests is full" in error_of(answer)["message"]
    assert int(answer.headers["retry-after"]) >= 1
    return True


def test_what_was_taken_is_given_back_whatever_becomes_of_the_request():
    buffers = Buffers(max_bytes=1000, metrics=Metrics(CollectorRegistry()))
    for _ in range(3):
        with contextlib.suppress(ZeroDivisionError), buffers.buffer() as one:
            one.grow(FREE_BYTES + 600)
            with buffers.buffer() as other:
                other.grow(FREE_BYTES)
                with pytest.raises(Overloaded):
                    other.grow(401)
            one.resize(10)
            with buffers.buffer() as other:
                other.grow(FREE_BYTES + 1000)
            raise ZeroDivisionError


def test_what_is_announced_takes_nothing():
    buffers = Buffers(max_bytes=1000, metrics=Metrics(CollectorRegistry()))
    with buffers.buffer() as announcing, buffers.buffer() as sending:
        announcing.expect(FREE_BYTES + 1000)
        sending.grow(FREE_BYTES + 1000)
        with pytest.raises(Overloaded):
            announcing.expect(FREE_BYTES + 1)
        announcing.expect(FREE_BYTES)


@pytest.mark.parametrize("stream", [False, True])
async def test_bodies_have_room_one_after_the_other_and_what_is_small_always(engine, stream):
    engine.delay_seconds = 0.5
    async with gateway(engine, **ROOM) as client:
        first = asyncio.create_task(client.post(CHAT, json=large(stream=stream)))
        await until(lambda: engine.running)
        assert value(client, "buffered_bytes") > BODY - FREE_BYTES
        assert refused(await client.post(CHAT, json=large()))
        assert (await client.post(CHAT, json=ask(note="x" * ROOM["max_body_bytes"]))).status_code == 413
        assert (await client.post(CHAT, json=ask(stream=stream))).status_code == 200
        assert (await first).status_code == 200
        assert value(client, "buffered_bytes") == 0
        assert (await client.post(CHAT, json=large())).status_code == 200
        assert value(client, "rejections_total", reason="queue_full") == 1


async def test_an_answer_that_has_begun_needs_no_room_for_its_request(engine):
    engine.hold = asyncio.Event()
    async with gateway(engine, **ROOM) as client:
        first = asyncio.create_task(client.post(CHAT, json=large(stream=True)))
        await until(lambda: engine.running and value(client, "buffered_bytes") == 0)
        second = asyncio.create_task(client.post(CHAT, json=large(stream=True)))
        await until(lambda: engine.running == 2)
        engine.hold.set()
        assert (await first).status_code == (await second).status_code == 200


async def test_a_body_without_a_length_is_refused_once_it_has_no_room(engine):
    engine.delay_seconds = 0.5
    sent = 0

    async def pieces():
        nonlocal sent
        for _ in range(300):
            sent += 1
            yield b" " * 1000

    async with gateway(engine, **ROOM) as client:
        first = asyncio.create_task(client.post(CHAT, json=large()))
        await until(lambda: engine.running)
        assert refused(await client.post(CHAT, content=pieces()))
        assert (await first).status_code == 200
    assert 200 < sent < 300


async def test_a_slow_client_holds_what_it_has_sent_and_not_for_longer_than_the_limit(engine):
    async def pieces():
        yield b" " * BODY
        await asyncio.sleep(30)

    async with gateway(engine, **ROOM, body_seconds=0.5) as client:
        slow = asyncio.create_task(client.post(CHAT, content=pieces()))
        await until(lambda: value(client, "buffered_bytes"))
        assert refused(await client.post(CHAT, json=large()))
        assert (await slow).status_code == 408
        assert value(client, "buffered_bytes") == 0
        assert (await client.post(CHAT, json=large())).status_code == 200
