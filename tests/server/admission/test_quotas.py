"""The tenants' limits, counted in the process and, if a Redis can be started, shared between gateways."""

import asyncio
import json
import logging
import time

import openai
import pytest
from prometheus_client import CollectorRegistry

from server.admission.quotas import Counts, Window, shared_storage
from server.engines.savings import tokens_of, usage_in
from server.keys import digest_of, new_key
from server.observe.metrics import Metrics
from server.settings import Settings
from tests.server.admission.redis_server import RedisServer
from tests.server.clips import clip, data_url
from tests.server.engine_double import COMPLETION
from tests.server.harness import CHAT, ask, ask_about, gateway, served, until

ACME, ACME_TOO, GLOBEX = (new_key() for _ in range(3))
TWO_SECONDS = data_url(clip())


@pytest.fixture(scope="module")
def redis(tmp_path_factory):
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(params=["memory", "redis"])
def backend(request):
    """The value of AOT_GATEWAY_LIMITS_BACKEND."""
    return "memory" if request.param == "memory" else request.getfixturevalue("redis").url


@pytest.fixture
def config(tmp_path):
    """Writes a file with acme's limits. The tenants' names are unique to the test, because the Redis outlives it."""
    name = time.time_ns()

    def write(acme):
        path = tmp_path / "gateway.yaml"
        path.write_text(
            f"tenants:\n"
            f"  acme-{name}:\n"
            f"    keys: [{{sha256: {digest_of(ACME.encode())}}}, {{sha256: {digest_of(ACME_TOO.encode())}}}]\n"
            f"    limits: {acme}\n"
            f"  globex-{name}: {{keys: [{{sha256: {digest_of(GLOBEX.encode())}}}]}}\n"
        )
        return path

    return write


def bearer(key):
    return {"authorization": f"Bearer {key}"}


def limits_told(answer, measure):
    told = [answer.headers.get(f"x-ratelimit-{what}-{measure}") for what in ("limit", "remaining", "reset")]
    assert told[2] is None or 0 <= float(told[2].removesuffix("s")) <= 60
    return told[:2]


def assert_is_limited(answer, text):
    assert answer.status_code == 429
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert text in answer.json()["error"]["message"]
    assert 1 <= int(answer.headers["retry-after"]) <= 60


async def test_requests_are_counted_over_all_keys_of_a_tenant_and_refused_beyond_the_limit(engine, config, backend):
    async with gateway(engine, config=config("{requests_per_minute: 3}"), limits_backend=backend) as client:
        answers = [await client.post(CHAT, json=ask(), headers=bearer(key)) for key in (ACME, ACME_TOO, ACME, ACME)]
        other = await client.post(CHAT, json=ask(), headers=bearer(GLOBEX))
        rejected = client.registry.get_sample_value("aot_gateway_rejections_total", {"reason": "rate_limited"})
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert [limits_told(answer, "requests") for answer in answers] == [["3", n] for n in ("2", "1", "0", "0")]
    assert_is_limited(answers[3], "at most 3 requests in a minute")
    assert limits_told(other, "requests") == [None, None]
    assert other.status_code == 200
    assert rejected == 1


async def test_tokens_are_charged_as_the_engine_counts_them_and_a_spent_window_refuses(engine, config, backend):
    async with gateway(engine, config=config("{tokens_per_minute: 1300}"), limits_backend=backend) as client:
        first = await client.post(CHAT, json=ask(), headers=bearer(ACME))
        second = await client.post(CHAT, json=ask(stream=True), headers=bearer(ACME))
        third = await client.post(CHAT, json=ask(), headers=bearer(ACME))
    assert [first.status_code, second.status_code] == [200, 200]
    assert limits_told(first, "tokens") == ["1300", "1300"]
    assert limits_told(second, "tokens") == ["1300", "648"]
    assert_is_limited(third, "at most 1300 tokens in a minute")
    assert limits_told(third, "tokens") == ["1300", "0"]
    assert len(engine.requests) == 2


async def test_a_stream_cut_short_is_charged_its_videos_tokens_and_what_came_of_it(engine, config):
    engine.hold = asyncio.Event()
    path = config("{tokens_per_minute: 629}")
    async with served(Settings(engines=(engine.url,), config=path), registry := CollectorRegistry()) as url:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=ACME, max_retries=0) as client:
            stream = await client.chat.completions.create(
                model="llava", messages=ask_about(TWO_SECONDS)["messages"], stream=True
            )
            async for chunk in stream:
                if chunk.choices[0].delta.content:
                    break
            await stream.close()
            labels = {"route": CHAT, "model": "llava", "status_class": "4xx", "stream": "true"}
            await until(lambda: registry.get_sample_value("aot_gateway_requests_total", labels))
        counted = [it.labels["tenant"] for it in usage_samples(registry) if it.labels["unit"] == "tokens" and it.value]
    (tenant,) = counted
    assert tenant.startswith("acme")
    assert registry.get_sample_value("aot_gateway_tenant_usage_total", {"tenant": tenant, "unit": "tokens"}) == 628


def usage_samples(registry):
    families = [family for family in registry.collect() if family.name == "aot_gateway_tenant_usage"]
    return [sample for family in families for sample in family.samples if sample.name.endswith("_total")]


async def test_seconds_of_video_are_counted_before_the_engine_is_asked(engine, config, backend):
    async with gateway(engine, config=config("{video_seconds_per_minute: 5}"), limits_backend=backend) as client:
        answers = [await client.post(CHAT, json=ask_about(TWO_SECONDS), headers=bearer(ACME)) for _ in range(3)]
        text = await client.post(CHAT, json=ask(), headers=bearer(ACME))
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [limits_told(answer, "video-seconds") for answer in answers] == [["5", "3"], ["5", "1"], ["5", "1"]]
    assert_is_limited(answers[2], "at most 5 video seconds in a minute")
    assert text.status_code == 200
    assert len(engine.requests) == 3


async def test_videos_longer_than_a_minutes_worth_are_no_matter_of_waiting(engine, config):
    async with gateway(engine, config=config("{video_seconds_per_minute: 1}")) as client:
        answer = await client.post(CHAT, json=ask_about(TWO_SECONDS), headers=bearer(ACME))
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "video_too_long"
    assert "last 2 seconds, more than the 1 in a minute" in answer.json()["error"]["message"]


async def test_requests_at_a_time_are_bounded_and_a_place_is_free_again_after_any_end(engine, config):
    engine.hold = asyncio.Event()
    async with gateway(engine, config=config("{concurrent_requests: 1}")) as client:
        running = asyncio.create_task(client.post(CHAT, json=ask(), headers=bearer(ACME)))
        await until(lambda: engine.running)
        refused = await client.get("/v1/files", headers=bearer(ACME_TOO))
        assert_is_limited(refused, "at most 1 requests at a time")
        assert (await client.get("/v1/files", headers=bearer(GLOBEX))).status_code == 404
        engine.hold.set()
        assert (await running).status_code == 200
        assert (await client.post(CHAT, content=b"{", headers=bearer(ACME))).status_code == 400
        assert (await client.post(CHAT, json=ask(), headers=bearer(ACME))).status_code == 200


async def test_an_open_gateway_holds_everybody_together_to_the_limits_of_the_file(engine, tmp_path):
    path = tmp_path / "gateway.yaml"
    path.write_text("limits: {requests_per_minute: 1}")
    async with gateway(engine, config=path) as client:
        assert (await client.post(CHAT, json=ask())).status_code == 200
        assert_is_limited(await client.post(CHAT, json=ask()), "at most 1 requests")
        assert (await client.get("/health/live")).status_code == 200
        assert (await client.get("/metrics")).status_code == 200


async def test_gateways_with_one_redis_share_their_counts(engine, config, redis):
    path = config("{requests_per_minute: 4}")
    async with (
        gateway(engine, config=path, limits_backend=redis.url) as one,
        gateway(engine, config=path, limits_backend=redis.url) as other,
    ):
        answers = await asyncio.gather(
            *(client.post(CHAT, json=ask(), headers=bearer(ACME)) for client in (one, other) for _ in range(4))
        )
    assert sorted(answer.status_code for answer in answers) == [200] * 4 + [429] * 4


async def test_without_its_redis_a_gateway_counts_by_itself_and_says_so_until_it_is_back(
    engine, config, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr("server.admission.quotas.REDIS_PAUSE_SECONDS", 0.2)
    caplog.set_level(logging.INFO)
    server = RedisServer(tmp_path)
    server.start()
    path = config("{requests_per_minute: 3}")
    try:
        async with gateway(engine, config=path, limits_backend=server.url) as client:

            async def status():
                return (await client.post(CHAT, json=ask(), headers=bearer(ACME))).status_code

            def up():
                return client.registry.get_sample_value("aot_gateway_limits_backend_up")

            assert [await status() for _ in range(2)] == [200, 200]
            assert up() == 1
            server.stop()
            assert [await status() for _ in range(4)] == [200, 200, 200, 429]
            assert up() == 0
            server.start()
            await asyncio.sleep(0.3)
            assert await status() == 200  # the new server has no counts
            assert up() == 1
    finally:
        server.stop()
    texts = [record.getMessage() for record in caplog.records]
    assert texts.count("the shared limits can't be reached: this gateway counts by itself until they can") == 1
    assert texts.count("the shared limits are back") == 1
    assert server.url not in json.dumps(texts)


async def test_who_polls_the_models_uses_up_nothing(engine, config):
    async with gateway(engine, config=config("{requests_per_minute: 1, concurrent_requests: 1}")) as client:
        for _ in range(5):
            for path in ("/v1/models", "/v1/models/llava"):
                assert (await client.get(path, headers=bearer(ACME))).status_code == 200
        assert (await client.get("/v1/models")).status_code == 401
        assert (await client.post(CHAT, json=ask(), headers=bearer(ACME))).status_code == 200
        assert_is_limited(await client.post(CHAT, json=ask(), headers=bearer(ACME)), "at most 1 requests in a minute")
        assert (await client.get("/v1/models", headers=bearer(ACME))).status_code == 200
        assert (await client.post("/v1/models", headers=bearer(ACME))).status_code == 429  # no look-up


@pytest.fixture
async def counts(backend):
    """Counts in windows of a second."""
    counts = Counts(shared_storage(backend), metrics=Metrics(CollectorRegistry()), period_seconds=1)
    yield counts
    await counts.close()


@pytest.fixture
def key():
    return f"key-{time.time_ns()}"


async def test_what_goes_beyond_the_limit_is_counted_in_full(counts, key):
    await counts.charge(key, 250)
    window = await counts.window(key)
    assert window.used == 250
    assert window.remaining(100) == 0
    assert 0 < window.seconds_until(1, 100) == window.reset_seconds <= 1


async def test_a_window_is_free_again_after_the_time_it_names_however_full_it_was(counts, key):
    for _ in range(3):  # a window that was full leaves nothing to the next one
        assert await counts.take(key, 3, limit=4)
        assert not await counts.take(key, 2, limit=4)
        await counts.charge(key, 100)
        wait = (await counts.window(key)).reset_seconds
        assert wait <= 1
        await asyncio.sleep(wait + 0.02)
        assert (await counts.window(key)) == Window(0, 0.0)


async def test_what_is_refused_is_not_counted(counts, key):
    assert await counts.take(key, 3, limit=4)
    for _ in range(5):
        assert not await counts.take(key, 2, limit=4)
    assert await counts.take(key, 1, limit=4)
    assert (await counts.window(key)).remaining(4) == 0


async def test_of_costs_taken_at_the_same_time_no_more_than_the_limit_fit(counts, key):
    taken = await asyncio.gather(*(counts.take(key, 1, limit=5) for _ in range(20)))
    assert sum(taken) <= 5
    assert (await counts.window(key)).used == sum(taken)


@pytest.mark.parametrize(
    ("used", "cost", "limit", "seconds"), [(0, 5, 5, 0), (3, 2, 5, 0), (3, 3, 5, 42.5), (9, 1, 5, 42.5), (9, 0, 5, 0)]
)
def test_a_cost_that_does_not_fit_waits_for_the_windows_end(used, cost, limit, seconds):
    assert Window(used, 42.5).seconds_until(cost, limit) == seconds


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        (json.dumps(COMPLETION).encode(), 652),
        (json.dumps(COMPLETION, ensure_ascii=False, indent=1).encode(), 652),
        (b'{"choices":[{"text":"\\"usage\\":{\\"total_tokens\\":9}"}],"usage":{"total_tokens":7},"x":1}', 7),
        (b'{"choices":[{"text":"\\"usage\\":{\\"total_tokens\\":9}"}]}', 0),
        (b'{"usage":null}', 0),
        (b'{"usage":{"total_tokens":true}}', 0),
        (b'{"usage":{"total_tokens":-5}}', 0),
        (b'{"usage":{"total_tokens":', 0),
        (b"[]", 0),
        (b"", 0),
    ],
)
def test_tokens_are_read_from_an_answer_and_from_nothing_in_its_text(body, tokens):
    assert tokens_of(usage_in(body)) == tokens
