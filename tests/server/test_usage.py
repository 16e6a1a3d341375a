"""`GET /v1/usage` and `GET /metrics/usage.csv`: who sees which numbers, of which days, and what is refused."""

import asyncio
import csv
import io
import json
from datetime import UTC, datetime, time, timedelta

import httpx
import pytest

from server.keys import digest_of, new_key
from server.observe import usage
from tests.server.admission.redis_server import RedisServer
from tests.server.clips import clip, data_url
from tests.server.harness import CHAT, GatewayProcess, ask, ask_about, error_of, gateway

ACME, GLOBEX, OPERATOR = (new_key() for _ in range(3))
VIDEO = data_url(clip())
NOTHING = {
    "requests": 0,
    "prompt_tokens": 0,
    "answer_tokens": 0,
    "video_tokens": {"before": 0, "after": 0, "saved": 0},
    "video_seconds": 0.0,
    "prefill_seconds_saved": 0.0,
}
ABOUT_A_VIDEO = {
    "requests": 1,
    "prompt_tokens": 640,
    "answer_tokens": 12,
    "video_tokens": {"before": 6272, "after": 627, "saved": 5645},
    "video_seconds": 2.0,
    "prefill_seconds_saved": 0.0,
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "gateway.yaml"
    tenants = {
        name: {"keys": [{"sha256": digest_of(key.encode())}]} for name, key in (("acme", ACME), ("globex", GLOBEX))
    }
    models = {name: {"engine_model": "llava"} for name in ("fast", "whole")}
    keys = [{"sha256": digest_of(OPERATOR.encode())}]
    path.write_text(json.dumps({"tenants": tenants, "models": models, "metrics_keys": keys}))
    return path


def bearer(key):
    return {"authorization": f"Bearer {key}"}


async def use(client):
    """Let acme ask two models, and globex about a video, all on one day, which is returned."""
    now = datetime.now(UTC)
    tomorrow = datetime.combine(now.date() + timedelta(days=1), time(), UTC)
    if (left := tomorrow - now) < timedelta(seconds=20):  # the day must not end in between
        await asyncio.sleep(left.total_seconds() + 0.1)
    began = datetime.now(UTC).date()
    for key, asked in (
        (ACME, ask_about(VIDEO, model="fast")),
        (ACME, ask_about(VIDEO, model="fast", stream=True)),
        (ACME, ask(model="whole")),
        (GLOBEX, ask_about(VIDEO, model="whole")),
    ):
        assert (await client.post(CHAT, json=asked, headers=bearer(key))).status_code == 200
    refused = await client.post(CHAT, json=ask(model="fast", aot={"retention": 7}), headers=bearer(GLOBEX))
    assert refused.status_code == 400
    return began.isoformat()


def twice(amounts):
    return {
        name: {each: 2 * count for each, count in amount.items()} if isinstance(amount, dict) else 2 * amount
        for name, amount in amounts.items()
    }


async def test_a_tenant_sees_its_own_usage_by_day_and_model(engine, config):
    async with gateway(engine, config=config) as client:
        day = await use(client)
        report = (await client.get("/v1/usage", headers=bearer(ACME))).json()
        others = (await client.get("/v1/usage?days=1", headers=bearer(GLOBEX))).json()
        assert (await client.get("/v1/usage")).status_code == 401
        assert (await client.get("/v1/usage", headers=bearer(OPERATOR))).status_code == 401
    assert report.keys() == {"object", "from", "to", "storage", "since", "total", "data"}
    assert (report["object"], report["to"], report["storage"]) == ("usage", day, "memory")
    assert datetime.fromisoformat(report["since"]).tzinfo is not None
    assert datetime.fromisoformat(report["to"]) - datetime.fromisoformat(report["from"]) == timedelta(days=29)
    text = {**NOTHING, "requests": 1, "prompt_tokens": 640, "answer_tokens": 12}
    text["video_tokens"] = ABOUT_A_VIDEO["video_tokens"]  # the double counts video tokens in every chat
    assert report["data"] == [
        {**twice(ABOUT_A_VIDEO), "date": day, "model": "fast"},
        {**text, "date": day, "model": "whole"},
    ]
    assert report["total"]["requests"] == 3
    assert report["total"]["video_tokens"] == {"before": 3 * 6272, "after": 3 * 627, "saved": 3 * 5645}
    assert others["total"] == ABOUT_A_VIDEO
    assert others["data"] == [{**ABOUT_A_VIDEO, "date": day, "model": "whole"}]
    assert others["from"] == others["to"] == day


async def test_the_operator_gets_a_table_of_all_tenants_with_the_key_for_metrics(engine, config):
    async with gateway(engine, config=config) as client:
        day = await use(client)
        answer = await client.get("/metrics/usage.csv", headers=bearer(OPERATOR))
        assert (await client.get("/metrics/usage.csv")).status_code == 401
        assert (await client.get("/metrics/usage.csv", headers=bearer(ACME))).status_code == 401
        error = error_of(await client.get("/metrics/usage.csv?days=x", headers=bearer(OPERATOR)))
        assert error["param"] == "days"
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert list(csv.DictReader(io.StringIO(answer.text))) == [
        row(day, "acme", "fast", (2, 1280, 24, 12544, 1254, 11290, 4.0, 0.0)),
        row(day, "acme", "whole", (1, 640, 12, 6272, 627, 5645, 0.0, 0.0)),
        row(day, "globex", "whole", (1, 640, 12, 6272, 627, 5645, 2.0, 0.0)),
    ]


def row(day, tenant, model, amounts):
    names = ("requests", "prompt_tokens", "answer_tokens", "video_tokens_before", "video_tokens_after")
    names += ("video_tokens_saved", "video_seconds", "prefill_seconds_saved")
    return {"date": day, "tenant": tenant, "model": model, **dict(zip(names, map(str, amounts), strict=True))}


async def test_without_keys_all_clients_together_see_what_they_used(engine):
    async with gateway(engine) as client:
        assert (await client.post(CHAT, json=ask_about(VIDEO))).status_code == 200
        report = (await client.get("/v1/usage?days=2")).json()
        table = (await client.get("/metrics/usage.csv")).text
    assert [entry["model"] for entry in report["data"]] == ["llava"]
    assert report["total"] == ABOUT_A_VIDEO
    assert table.splitlines()[1].split(",")[1:3] == ["none", "llava"]


@pytest.fixture
def at_noon(monkeypatch):
    """The gateway believes that it is noon on 25 November 2026, and keeps ten days."""
    moment = datetime(2026, 11, 25, 12, tzinfo=UTC).timestamp()
    monkeypatch.setattr("server.observe.usage.Ledger.today", property(lambda _: usage.today(moment)))


@pytest.mark.parametrize(
    ("query", "first", "last"),
    [
        ("", "2026-11-16", "2026-11-25"),
        ("days=1", "2026-11-25", "2026-11-25"),
        ("days=10", "2026-11-16", "2026-11-25"),
        ("from=2026-11-20", "2026-11-20", "2026-11-25"),
        ("to=2026-11-20", "2026-11-16", "2026-11-20"),
        ("from=2026-11-16&to=2026-11-16", "2026-11-16", "2026-11-16"),
        ("from=2026-11-20&to=2026-11-30", "2026-11-20", "2026-11-25"),
    ],
)
async def test_days_are_asked_for_by_number_or_by_their_ends(engine, at_noon, query, first, last):
    async with gateway(engine, usage_days=10) as client:
        report = (await client.get(f"/v1/usage?{query}")).json()
    assert (report["from"], report["to"], report["data"], report["total"]) == (first, last, [], NOTHING)


@pytest.mark.parametrize(
    ("query", "param", "message"),
    [
        ("days=0", "days", "days must be a whole number in [1, 10], the days that are kept, got '0'"),
        ("days=11", "days", "days must be a whole number in [1, 10], the days that are kept, got '11'"),
        ("days=1.5", "days", "days must be a whole number in [1, 10], the days that are kept, got '1.5'"),
        ("days=", "days", "days must be a whole number in [1, 10], the days that are kept, got ''"),
        ("days=%C2%B2", "days", "days must be a whole number in [1, 10], the days that are kept, got '²'"),
        ("days=2&to=2026-11-20", "days", "days can't be combined with from and to: ask for one or the other"),
        ("from=yesterday", "from", "from must be a date such as 2026-11-25, got 'yesterday'"),
        ("to=20261120", "to", "to must be a date such as 2026-11-25, got '20261120'"),
        ("to=2026-02-30", "to", "to must be a date such as 2026-11-25, got '2026-02-30'"),
        ("from=2026-W47-1", "from", "from must be a date such as 2026-11-25, got '2026-W47-1'"),
        (
            "from=2026-11-15",
            "from",
            "from must not be before 2026-11-16: usage is kept for 10 days, got 2026-11-15",
        ),
        ("to=2026-11-15", "to", "to must not be before 2026-11-16: usage is kept for 10 days, got 2026-11-15"),
        ("from=2026-11-26", "from", "from must not be after today, 2026-11-25 in UTC, got 2026-11-26"),
        ("from=2026-11-20&to=2026-11-19", "from", "from must not be after to, got 2026-11-20 and 2026-11-19"),
        ("start=2026-11-20", "start", "'start' is not a parameter here; the parameters are from, to, days"),
    ],
)
async def test_days_that_are_none_are_refused_with_what_is_allowed(engine, at_noon, query, param, message):
    async with gateway(engine, usage_days=10) as client:
        answer = await client.get(f"/v1/usage?{query}")
    assert answer.status_code == 400
    error = error_of(answer)
    assert (error["param"], error["message"], error["type"]) == (param, message, "invalid_request_error")


async def test_while_redis_is_gone_requests_are_served_and_their_usage_is_there_afterwards(
    engine, config, tmp_path, monkeypatch
):
    monkeypatch.setattr(usage, "PAUSE_SECONDS", 0.0)
    redis = RedisServer(tmp_path)
    try:
        async with gateway(engine, config=config, limits_backend=redis.url) as client:
            await use(client)
            gone = await client.get("/v1/usage", headers=bearer(ACME))
            assert gone.status_code == 503
            assert error_of(gone)["code"] == "usage_unavailable"
            assert gone.headers["retry-after"] == "5"
            assert client.registry.get_sample_value("aot_gateway_usage_unsaved_requests") == 4
            redis.start()
            report = (await client.get("/v1/usage", headers=bearer(ACME))).json()
            assert (report["storage"], report["since"], report["total"]["requests"]) == ("redis", None, 3)
            assert client.registry.get_sample_value("aot_gateway_usage_unsaved_requests") == 0
    finally:
        redis.stop()


async def test_usage_in_redis_survives_a_restart_and_replicas_add_up(engine, config, tmp_path):
    redis = RedisServer(tmp_path)
    redis.start()
    began = datetime.now(UTC).date()
    try:
        settings = {"CONFIG": str(config), "LIMITS_BACKEND": redis.url, "DRAIN_SECONDS": "0"}
        async with (
            GatewayProcess(engine.url, **settings) as process,
            httpx.AsyncClient(base_url=process.url) as remote,
            gateway(engine, config=config, limits_backend=redis.url) as replica,
        ):
            for client in (remote, replica):
                assert (await client.post(CHAT, json=ask(model="fast"), headers=bearer(ACME))).status_code == 200
            process.drain()
            assert (await process.ended())[0] == 0
        async with gateway(engine, config=config, limits_backend=redis.url) as again:
            assert (await again.post(CHAT, json=ask(model="fast"), headers=bearer(ACME))).status_code == 200
            report = (await again.get("/v1/usage?days=2", headers=bearer(ACME))).json()
    finally:
        redis.stop()
    assert report["total"]["requests"] == sum(entry["requests"] for entry in report["data"]) == 3
    assert {entry["date"] for entry in report["data"]} <= {began.isoformat(), datetime.now(UTC).date().isoformat()}
