"""The usage ledger, in memory and in a real Redis that comes and goes."""

import json
import logging
from datetime import date
from uuid import uuid4

import pytest
from prometheus_client import CollectorRegistry
from redis.exceptions import ConnectionError as Unreachable

from server.errors import UsageUnavailable
from server.observe import usage
from server.observe.metrics import Metrics
from server.observe.record import RequestRecord
from server.observe.usage import DAY_SECONDS, Amounts, Ledger, Place, day_of, number_of, shared_usage, today
from tests.server.admission.redis_server import RedisServer
from tests.server.harness import until

DAY = today()
NOON = (DAY + 0.5) * DAY_SECONDS


@pytest.fixture(scope="module")
def redis(tmp_path_factory):
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


class Clock:
    def __init__(self):
        self.seconds = NOON

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock():
    return Clock()


def ledger(url, clock, *, days=3):
    metrics = Metrics(CollectorRegistry())
    made = Ledger(shared_usage(url, seconds=0.5, days=days), days=days, metrics=metrics, clock=clock)
    made.metrics = metrics
    return made


def record(**fields):
    counted = {"prompt_tokens": 640, "completion_tokens": 12}
    given = {"model": "fast", "tokens": 652, "video_tokens": (6272, 627), "video_seconds": 2.5, "usage": counted}
    return RequestRecord("req", **{**given, "prefill_seconds": (4.0, 0.75), **fields})


ONE = Amounts(1, 640, 12, 6272, 627, 2.5, 3.25)
TWO = Amounts(2, 1280, 24, 12544, 1254, 5.0, 6.5)


@pytest.fixture
def tenant():
    """A name that no other test has used: the Redis outlives them."""
    return f"t{uuid4().hex[:12]}"


@pytest.mark.parametrize(
    ("fields", "amounts"),
    [
        ({}, ONE),
        ({"prefill_seconds": None}, Amounts(1, 640, 12, 6272, 627, 2.5, 0.0)),
        ({"prefill_seconds": (1.0, 1.5)}, Amounts(1, 640, 12, 6272, 627, 2.5, -0.5)),
        ({"video_tokens": None, "video_seconds": 0.0, "prefill_seconds": None}, Amounts(1, 640, 12, 0, 0, 0.0, 0.0)),
        # a stream that was cut short: the tokens of its videos, and three chunks
        ({"usage": {}, "tokens": 630, "prefill_seconds": None}, Amounts(1, 627, 3, 6272, 627, 2.5, 0.0)),
        ({"usage": {"input_tokens": 640, "output_tokens": 12}}, ONE),
    ],
)
def test_a_request_counts_what_the_engine_counted(fields, amounts):
    assert Amounts.of(record(**fields)) == amounts
    assert ONE.video_tokens_saved == 5645


def test_days_are_those_of_utc():
    assert (today(0), today(DAY_SECONDS - 1), today(DAY_SECONDS)) == (0, 0, 1)
    assert day_of(0) == date(1970, 1, 1)
    assert all(number_of(day_of(number)) == number for number in (0, 1, 20000, 20782))
    assert day_of(20782) == date(2026, 11, 25)


@pytest.fixture(params=["memory", "redis"])
def backend(request):
    return "memory" if request.param == "memory" else request.getfixturevalue("redis").url


async def test_rows_are_by_day_tenant_and_model_and_old_ones_go(backend, clock, tenant):
    other = f"{tenant}-too"
    kept = ledger(backend, clock)
    async with kept.running():
        kept.count(record(), tenant=tenant)
        kept.count(record(), tenant=other)
        kept.count(record(model="a:b c\n"), tenant=tenant)
        kept.count(record(tokens=0), tenant=tenant)  # no engine has answered it
        clock.seconds += DAY_SECONDS
        for _ in range(2):
            kept.count(record(), tenant=tenant)
        yesterday = {Place(DAY, tenant, "fast"): ONE, Place(DAY, tenant, "a:b c\n"): ONE}
        now = {Place(DAY + 1, tenant, "fast"): TWO}
        assert await kept.rows(DAY - 1, DAY + 1, tenant=tenant) == yesterday | now
        assert await kept.rows(DAY, DAY, tenant=tenant) == yesterday
        assert await kept.rows(DAY + 1, DAY + 5, tenant=tenant) == now
        assert await kept.rows(DAY + 2, DAY + 2, tenant=tenant) == {}
        everyone = await kept.rows(DAY, DAY + 1, tenant=None)
        assert {place for place in everyone if place.tenant.startswith(tenant)} == {
            *yesterday,
            *now,
            Place(DAY, other, "fast"),
        }
        if backend == "memory":
            clock.seconds += 2 * DAY_SECONDS
            assert await kept.rows(0, DAY + 9, tenant=tenant) == now
            clock.seconds += DAY_SECONDS
            assert await kept.rows(0, DAY + 9, tenant=tenant) == {}


async def test_redis_forgets_a_day_when_it_is_no_longer_kept(redis, tenant):
    kept = ledger(redis.url, usage.time.time, days=3)
    async with kept.running():
        kept.count(record(), tenant=tenant)
        assert await kept.save()
        expected = (kept.today + 3) * DAY_SECONDS
        for key in (usage._key(kept.today), usage._key(kept.today, tenant)):
            assert await kept._shared._client.expiretime(key) == expected


async def test_gateways_with_one_redis_add_up_and_a_restart_forgets_nothing(redis, clock, tenant):
    for _ in range(2):
        one, other = ledger(redis.url, clock), ledger(redis.url, clock)
        async with one.running(), other.running():
            for kept in (one, other):
                kept.count(record(), tenant=tenant)
            await other.save()
            assert (await one.rows(DAY, DAY, tenant=tenant))[Place(DAY, tenant, "fast")].requests >= 2
    again = ledger(redis.url, clock)
    async with again.running():
        total = (await again.rows(DAY, DAY, tenant=tenant))[Place(DAY, tenant, "fast")]
    assert total == Amounts(4, 4 * 640, 4 * 12, 4 * 6272, 4 * 627, 10.0, 13.0)


async def test_what_waits_for_a_redis_is_saved_once_when_it_is_back(clock, tenant, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(usage, "SAVE_SECONDS", 0.02)
    monkeypatch.setattr(usage, "PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(usage, "BATCH_ROWS", 3)
    caplog.set_level(logging.INFO)
    server = RedisServer(tmp_path)
    kept = ledger(server.url, clock)
    unsaved = kept.metrics.usage_unsaved_requests._value
    try:
        async with kept.running():
            for number in range(10):
                kept.count(record(model=f"m{number % 5}"), tenant=tenant)
            assert not await kept.save()
            assert unsaved.get() == 10
            with pytest.raises(UsageUnavailable):
                await kept.rows(DAY, DAY, tenant=tenant)
            server.start()
            await until(lambda: not unsaved.get())
            rows = await kept.rows(DAY, DAY, tenant=tenant)
    finally:
        server.stop()
    assert rows == {Place(DAY, tenant, f"m{number}"): TWO for number in range(5)}
    told = [entry.getMessage() for entry in caplog.records]
    assert told.count("the usage can't be saved: it is kept here and sent again") == 1
    assert told.count("the usage is saved again") == 1
    assert server.url not in json.dumps(told)


async def test_a_batch_whose_answer_was_lost_is_not_counted_twice(redis, clock, tenant, monkeypatch):
    kept = ledger(redis.url, clock)
    add, sent = kept._shared.add, []

    async def lose_the_answer(batch_id, rows):
        sent.append(batch_id)
        await add(batch_id, rows)
        if len(sent) < 3:
            raise Unreachable("the connection broke after the batch")

    monkeypatch.setattr(kept._shared, "add", lose_the_answer)
    monkeypatch.setattr(usage, "PAUSE_SECONDS", 0.0)
    async with kept.running():
        kept.count(record(), tenant=tenant)
        assert not await kept.save()
        kept.count(record(), tenant=tenant)  # counted meanwhile: a batch of its own
        assert not await kept.save()
        assert await kept.save()
        assert len(set(sent)) == 2
        assert await kept.rows(DAY, DAY, tenant=tenant) == {Place(DAY, tenant, "fast"): TWO}


async def test_after_a_failure_redis_is_left_alone_for_a_moment_but_not_at_the_end(clock, tmp_path, monkeypatch):
    monkeypatch.setattr(usage, "PAUSE_SECONDS", 60.0)
    kept = ledger(RedisServer(tmp_path).url, clock)
    sent = []

    async def fail(*_):
        sent.append(1)
        raise Unreachable("nobody is there")

    monkeypatch.setattr(kept._shared, "add", fail)
    async with kept.running():
        kept.count(record(), tenant="acme")
        for _ in range(5):
            with pytest.raises(UsageUnavailable):
                await kept.rows(DAY, DAY, tenant="acme")
        assert len(sent) == 1
    assert len(sent) == 2


async def test_what_can_not_be_saved_before_the_end_is_in_the_log(clock, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(usage, "LAST_LINES", 2)
    kept = ledger(RedisServer(tmp_path).url, clock)
    async with kept.running():
        for number in range(4):
            kept.count(record(model=f"m{number}"), tenant="acme")
    lines = [entry for entry in caplog.records if entry.getMessage() == "usage was not saved"]
    assert [(line.date, line.tenant, line.model, line.requests) for line in lines] == [
        (day_of(DAY).isoformat(), "acme", "m0", 1),
        (day_of(DAY).isoformat(), "acme", "m1", 1),
    ]
    assert lines[0].video_tokens_before == 6272
    (rest,) = [entry for entry in caplog.records if entry.getMessage() == "more usage was not saved"]
    assert rest.requests == 2


async def test_rows_that_were_never_saved_are_told_when_they_are_dropped(clock, tmp_path, caplog):
    kept = ledger(RedisServer(tmp_path).url, clock, days=2)
    kept.count(record(), tenant="acme")
    clock.seconds += 2 * DAY_SECONDS
    kept._drop_old()
    assert [entry.getMessage() for entry in caplog.records] == ["usage was not saved"]
    assert kept._rows == {}
    await kept._shared.close()


async def test_memory_is_bounded_by_places_not_by_requests(clock):
    kept = ledger("memory", clock)
    for number in range(1000):
        kept.count(record(model=f"m{number % 3}"), tenant="acme")
    assert len(kept._rows) == 3
    assert sum(amounts.requests for amounts in kept._rows.values()) == 1000
