"""A request that is refused before it is read is counted with its route, its model and its tenant."""

import asyncio
import json
import math

import pytest

from server.keys import digest_of, new_key
from tests.server.clips import clip, data_url
from tests.server.engine_double import SAVED
from tests.server.harness import CHAT, ask, ask_about, gateway, until, value

KEY = new_key()
BEARER = {"authorization": f"Bearer {KEY}"}
LATE = {"messages": [{"role": "user", "content": "x" * 300_000}], "model": "fast"}
EARLY = {"model": "fast", "messages": [{"role": "user", "content": '{"model": "whole"}' + "x" * 300_000}]}


@pytest.fixture
def config(tmp_path):
    def written(limits):
        path = tmp_path / "gateway.yaml"
        models = {name: {"engine_model": "llava"} for name in ("fast", "whole", "fäst/1")}
        tenants = {"acme": {"keys": [{"sha256": digest_of(KEY.encode())}], "limits": limits}}
        path.write_text(json.dumps({"models": models, "tenants": tenants}))
        return path

    return written


def refused(client, model, route=CHAT):
    labels = {"route": route, "model": model, "status_class": "4xx", "stream": "false"}
    return value(client, "requests_total", **labels)


def lines(caplog, status=429):
    logged = [record for record in caplog.records if record.getMessage() == "request" and record.status == status]
    return [(record.route, record.model, record.tenant, record.reason) for record in logged]


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (ask(model="whole"), "whole"),
        (LATE, "fast"),
        (EARLY, "fast"),
        (ask(model="fäst/1"), "fäst/1"),
        (ask(model="gpt-9"), "none"),
        (ask(metadata={"model": "gpt-9"}, model="fast"), "fast"),
        ({"messages": []}, "none"),
    ],
    ids=["short", "late", "early", "escaped", "unknown", "another before", "without"],
)
async def test_a_request_beyond_a_limit_is_counted_with_its_route_model_and_tenant(engine, config, caplog, body, model):
    caplog.set_level("INFO", logger="server")
    async with gateway(engine, config=config({"requests_per_minute": 1})) as client:
        assert (await client.get("/v1/files", headers=BEARER)).status_code == 404  # counts, unlike looking models up
        answer = await client.post(CHAT, content=json.dumps(body), headers=BEARER)
        assert answer.status_code == 429
        assert refused(client, model) == 1
        assert value(client, "tenant_usage_total", tenant="acme", unit="rate_limited") == 1
        assert value(client, "tenant_usage_total", tenant="acme", unit="requests") == 1
    assert lines(caplog) == [(CHAT, model, "acme", "rate_limited")]


async def test_other_routes_beyond_a_limit_have_theirs(engine, config, caplog):
    caplog.set_level("INFO", logger="server")
    async with gateway(engine, config=config({"concurrent_requests": 1})) as client:
        engine.hold = asyncio.Event()
        running = asyncio.create_task(client.post(CHAT, json=ask(model="fast"), headers=BEARER))
        await until(lambda: engine.running)
        assert (await client.get("/v1/files/file-1", headers=BEARER)).status_code == 429
        assert refused(client, "none", "/v1/files/{id}") == 1
        engine.hold.set()
        await running


async def test_a_request_without_a_place_is_counted_with_its_route_model_and_tenant(engine, config, caplog):
    caplog.set_level("INFO", logger="server")
    async with gateway(engine, config=config({}), max_concurrency=1, max_queue=0) as client:
        engine.hold = asyncio.Event()
        running = asyncio.create_task(client.post(CHAT, json=ask(model="fast"), headers=BEARER))
        await until(lambda: engine.running)
        for body in (ask(model="whole"), LATE):
            assert (await client.post(CHAT, json=body, headers=BEARER)).status_code == 429
        assert refused(client, "whole") == refused(client, "fast") == 1
        engine.hold.set()
        await running
    assert lines(caplog) == [(CHAT, model, "acme", "queue_full") for model in ("whole", "fast")]


async def test_a_body_that_does_not_come_is_not_waited_for_long(engine, config, monkeypatch):
    monkeypatch.setattr("server.edge.body.SKIM_SECONDS", 0.1)

    async def never():
        yield b"{"
        await asyncio.Event().wait()

    async with gateway(engine, config=config({"requests_per_minute": 1})) as client:
        await client.get("/v1/files", headers=BEARER)
        async with asyncio.timeout(5):
            assert (await client.post(CHAT, content=never(), headers=BEARER)).status_code == 429


async def test_a_client_that_waits_to_be_asked_for_its_body_is_not_asked(engine, config):
    asked = []

    async def body():
        asked.append(True)
        yield json.dumps(ask(model="fast")).encode()

    async with gateway(engine, config=config({"requests_per_minute": 1})) as client:
        await client.get("/v1/files", headers=BEARER)
        answer = await client.post(CHAT, content=body(), headers={**BEARER, "expect": "100-continue"})
        assert answer.status_code == 429
        assert refused(client, "none") == 1
    assert asked == []


async def test_a_refused_key_has_its_route(engine, config):
    async with gateway(engine, config=config({})) as client:
        assert (await client.post(CHAT, json=ask(model="fast"))).status_code == 401
        assert refused(client, "none") == 1


async def test_a_request_refused_for_tokens_costs_no_request(engine, config):
    engine.headers = {}
    async with gateway(engine, config=config({"tokens_per_minute": 10, "requests_per_minute": 9})) as client:
        assert (await client.post(CHAT, json=ask(model="fast"), headers=BEARER)).status_code == 200
        for _ in range(3):
            answer = await client.post(CHAT, json=ask(model="fast"), headers=BEARER)
            assert answer.status_code == 429
            assert "tokens" in answer.json()["error"]["message"]
            assert answer.headers["x-ratelimit-remaining-requests"] == "8"


def quantile(client, share):
    """What Prometheus's histogram_quantile reads from the retentions so far."""
    buckets = sorted(
        (float(sample.labels["le"]), sample.value)
        for family in client.registry.collect()
        for sample in family.samples
        if sample.name == "aot_gateway_video_retention_ratio_bucket"
    )
    rank, below, count = share * buckets[-1][1], 0.0, 0.0
    for bound, upto in buckets:
        if upto >= rank:
            return below + (bound - below) * (rank - count) / (upto - count)
        below, count = bound, upto
    return math.nan


@pytest.mark.parametrize("retention", [0.01, 0.05, 0.1, 0.15, 0.25, 0.3, 0.5, 0.75, 1.0])
async def test_a_retention_reads_as_what_it_is(engine, retention):
    engine.headers = {**SAVED, "x-aot-video-tokens-before": "10000"}
    engine.headers["x-aot-video-tokens-after"] = str(round(10000 * retention))
    async with gateway(engine) as client:
        for _ in range(2):
            assert (await client.post(CHAT, json=ask_about(data_url(clip())))).status_code == 200
        within = 0.005 if retention <= 0.3 else 0.025
        assert abs(quantile(client, 0.5) - retention) <= within
        assert abs(quantile(client, 0.95) - retention) <= within


async def test_the_log_says_what_a_request_used_where_and_how_fast(engine, caplog):
    caplog.set_level("INFO", logger="server")
    async with gateway(engine) as client:
        await client.post(CHAT, json=ask_about(data_url(clip()), stream=True))
        await client.post(CHAT, json=ask_about(data_url(clip())))
        engine.error = (500, b"{}", "application/json")
        await client.post(CHAT, json=ask())
        engine.error, engine.dies_after = None, 0
        await client.post(CHAT, json=ask())
    stream, whole, error, died = [record for record in caplog.records if record.getMessage() == "request"]
    for line in (stream, whole):
        assert (line.prompt_tokens, line.answer_tokens) == (640, 12)
        assert (line.engine, line.retention, line.reason, line.cause) == ("engine-0", 0.1, None, None)
    assert 0 < stream.seconds_to_first_token <= stream.seconds
    assert whole.seconds_to_first_token is None
    assert (error.reason, error.code, error.cause) == ("engine_failed", "engine_failed", "engine status 500")
    assert (died.reason, died.cause, died.engine) == ("engine_failed", "ServerDisconnectedError", "engine-0")
    assert died.prompt_tokens is None
