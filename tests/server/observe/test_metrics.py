import asyncio
import json

import pytest

from server import __version__
from server.engines.check import REMEDIES
from server.errors import REASONS
from server.keys import digest_of, new_key
from server.observe.metrics import TENANT_UNITS
from tests.server.clips import clip, data_url
from tests.server.engine_double import COMPLETION, TEXT, EngineDouble
from tests.server.engines.profiles import ONEVISION
from tests.server.harness import CHAT, ask, ask_about, free_port, gateway, until, value
from tests.server.media.hosts import MediaHost

VIDEO = data_url(clip())


@pytest.mark.parametrize(
    ("headers", "kept"),
    [
        ({"x-request-id": "abc-1.2_3"}, "abc-1.2_3"),
        ({"x-client-request-id": "sdk-7"}, "sdk-7"),
        ({"x-request-id": "first", "x-client-request-id": "second"}, "first"),
        ({"x-request-id": "a" * 129}, None),
        ({"x-request-id": "a b"}, None),
        ({"x-request-id": "<script>"}, None),
        ({}, None),
    ],
)
async def test_a_sane_request_id_is_kept_and_any_other_replaced(engine, headers, kept):
    async with gateway(engine) as client:
        ids = [(await client.get("/health/live", headers=headers)).headers["x-request-id"] for _ in range(2)]
    if kept:
        assert ids == [kept, kept]
    else:
        assert all(id_.startswith("req_") and len(id_) == 36 for id_ in ids)
        assert ids[0] != ids[1]


LABELS = {
    "requests_total": {"route", "model", "status_class", "stream"},
    "request_duration_seconds": {"route", "stream"},
    "time_to_first_token_seconds": {"model"},
    "inter_token_latency_seconds": {"model"},
    "overhead_seconds": {"phase"},
    "video_tokens_total": {"model", "stage"},
    "prefill_seconds_total": {"model", "stage"},
    "video_retention_ratio": {"model"},
    "video_retention_limit_ratio": {"model"},
    "video_bytes": set(),
    "video_duration_seconds": set(),
    "probes_total": set(),
    "rejections_total": {"reason"},
    "tenant_usage_total": {"tenant", "unit"},
    "limits_backend_up": set(),
    "usage_unsaved_requests": set(),
    "upstream_retries_total": {"reason"},
    "affinity_total": {"outcome"},
    "engine_up": {"engine"},
    "engine_check": {"engine", "check"},
    "engine_breaker_open": {"engine"},
    "inflight_requests": set(),
    "buffered_bytes": set(),
    "queue_depth": set(),
    "config_info": {"sha256"},
    "config_last_reload_successful": set(),
    "config_last_reload_success_timestamp_seconds": set(),
    "build_info": {"version"},
}
CLOSED = {
    "stage": {"before", "after"},
    "phase": {"parse", "fetch", "probe", "queue", "connect"},
    "reason": {*REASONS, "connect", "refused", "misconfigured", "cache_miss"},
    "outcome": {"hit", "spilled", "none"},
    "unit": set(TENANT_UNITS),
    "status_class": {"2xx", "4xx", "5xx"},
    "stream": {"true", "false"},
    "engine": {"engine-0", "engine-1"},
    "check": set(REMEDIES),
    "version": {__version__},
    "tenant": {"acme", "globex", "none"},
    "model": {"fast", "other", "none"},
}


def samples(registry):
    """The values of all series, by metric and labels. For histograms, the number of observations."""
    return {
        (sample.name.removeprefix("aot_gateway_").removesuffix("_count"), tuple(sorted(sample.labels.items()))): (
            sample.value
        )
        for family in registry.collect()
        for sample in family.samples
        if not sample.name.endswith(("_created", "_bucket", "_sum"))
    }


class Watched:
    """Finds the metrics that have changed."""

    def __init__(self, client):
        self.client = client
        self.begin = samples(client.registry)

    def moved(self):
        now = samples(self.client.registry)
        moved = {key for key in now if now[key] != self.begin.get(key, 0.0)}
        self.begin = now
        return {name for name, _ in moved}, moved


@pytest.fixture
async def watched(engine, tmp_path, monkeypatch):
    """A gateway with two engines and two tenants, whose limits and usage are in a Redis that does not run."""
    monkeypatch.setattr("server.observe.usage.SAVE_SECONDS", 0.02)
    keys = {name: new_key() for name in ("acme", "globex")}
    tenants = {name: {"keys": [{"sha256": digest_of(key.encode())}]} for name, key in keys.items()}
    models = {"fast": {"engine_model": "llava", "max_retention": 0.5}}
    config = tmp_path / "gateway.yaml"
    config.write_text(json.dumps({"tenants": tenants, "models": models, "limits": {"requests_per_minute": 1000}}))
    async with EngineDouble().serving() as other, MediaHost().serving() as host:
        settings = {
            "config": config,
            "limits_backend": f"redis://127.0.0.1:{free_port()}/0",
            "engines": (engine.url, other.url),
            "engine_health_seconds": 0.05,
            "media_allow_hosts": (host.host,),
            "media_allow_http": True,
            "max_concurrency": 1,
        }
        async with gateway(**settings) as client:
            client.headers["authorization"] = f"Bearer {keys['acme']}"
            client.engines, client.video = (engine, other), f"{host.url}/clip.mp4"
            client.digest = digest_of(config.read_bytes())[:12]
            yield client


async def test_each_metric_has_its_labels_and_moves_with_its_request(watched):
    def told(name, **labels):
        return name, tuple(sorted(labels.items()))

    client, (engine, other) = watched, watched.engines
    watch = Watched(client)
    configuration = {
        "config_info": {"sha256": client.digest},
        "config_last_reload_successful": {},
        "config_last_reload_success_timestamp_seconds": {},
    }
    assert {key for key, value_ in watch.begin.items() if value_} == {
        told("build_info", version=__version__),
        *(told(name, **labels) for name, labels in configuration.items()),
        told("video_retention_limit_ratio", model="fast"),
        told("limits_backend_up"),
        told("engine_up", engine="engine-0"),
        told("engine_up", engine="engine-1"),
        *(told("engine_check", engine=f"engine-{i}", check=check) for i in range(2) for check in ("key", "models")),
    }

    assert (await client.post(CHAT, json=ask_about(client.video, model="fast", stream=True))).status_code == 200
    names, moved = watch.moved()
    route = {"route": CHAT, "stream": "true"}
    assert moved - {told("usage_unsaved_requests")} == {
        told("requests_total", **route, model="fast", status_class="2xx"),
        told("request_duration_seconds", **route),
        told("time_to_first_token_seconds", model="fast"),
        told("inter_token_latency_seconds", model="fast"),
        *(told("overhead_seconds", phase=phase) for phase in CLOSED["phase"]),
        *(told("video_tokens_total", model="fast", stage=stage) for stage in CLOSED["stage"]),
        told("video_retention_ratio", model="fast"),
        told("video_bytes"),
        told("video_duration_seconds"),
        told("probes_total"),
        *(told("tenant_usage_total", tenant="acme", unit=unit) for unit in set(TENANT_UNITS) - {"rate_limited"}),
        told("affinity_total", outcome="hit"),
        told("limits_backend_up"),
    }
    seen = names

    assert (await client.post(CHAT, json=ask(model="fast", aot={"retention": 0.9}))).status_code == 400
    names, moved = watch.moved()
    assert told("rejections_total", reason="retention") in moved
    assert told("requests_total", route=CHAT, stream="false", model="fast", status_class="4xx") in moved
    seen |= names

    engine.hold = other.hold = asyncio.Event()
    asking = [asyncio.create_task(client.post(CHAT, json=ask(model="fast", note="x" * 10**5))) for _ in range(2)]
    await until(lambda: value(client, "queue_depth") == 1)
    names, _ = watch.moved()
    assert names >= {"inflight_requests", "queue_depth", "buffered_bytes"}
    seen |= names
    engine.hold.set()
    assert [answer.status_code for answer in await asyncio.gather(*asking)] == [200, 200]
    engine.hold = other.hold = None

    engine.error = (503, b"{}", "application/json")
    for _ in range(4):  # the engines take turns
        assert (await client.post(CHAT, json=ask(model="fast"))).status_code == 200
    names, moved = watch.moved()
    assert told("upstream_retries_total", reason="refused") in moved
    seen |= names

    other.dies_after = 0
    while value(client, "engine_breaker_open", engine="engine-1") == 0:
        assert (await client.post(CHAT, json=ask(model="fast"))).status_code in (502, 503)
    other.healthy = False
    await until(lambda: value(client, "engine_up", engine="engine-1") == 0)
    await until(lambda: value(client, "usage_unsaved_requests"))
    names, moved = watch.moved()
    assert {told("engine_up", engine="engine-1"), told("engine_breaker_open", engine="engine-1")} <= moved
    still = {"build_info", "video_retention_limit_ratio", "engine_check", *configuration}
    unmeasured = {"prefill_seconds_total"}  # by these engines
    assert seen | names == set(LABELS) - still - unmeasured

    for name, labels in watch.begin:
        assert {label for label, _ in labels} == LABELS[name]
        for label, text in labels:
            assert label == "route" or text in {*CLOSED.get(label, ()), client.digest}, (name, label, text)


async def test_nothing_that_clients_make_up_is_a_label(watched):
    async def send(word):
        for headers in ({}, {"authorization": f"Bearer {word}"}, {"x-request-id": word, "user-agent": word}):
            for method, path in (("GET", f"/{word}"), ("POST", f"/v1/{word}"), (word.upper(), CHAT), ("HEAD", "/")):
                await watched.request(method, path, headers=headers)
            await watched.get(f"/v1/models/{word}", headers=headers)
            await watched.get(f"/v1/files/{word}", headers=headers)
            for path in (CHAT, "/v1/completions", "/v1/responses"):
                content = ask(model=word, user=word, input=word, prompt=word, stream=word == "second")
                await watched.post(path, json=content, headers=headers)

    await send("second")
    await send("first")
    known = set(samples(watched.registry))
    for number in range(3):
        await send(f"w{number}-{'x' * 10 * number}")
    assert set(samples(watched.registry)) == known
    assert {dict(labels)["model"] for name, labels in known if name == "requests_total"} <= CLOSED["model"]
    routes = {dict(labels)["route"] for name, labels in known if name == "requests_total"}
    assert routes <= {CHAT, "/v1/completions", "/v1/responses", "/v1/models/{id}", "/v1/files/{id}", "other"}


async def test_every_metric_of_a_request_moves(engine):
    engine.gap_seconds = 0.01
    async with gateway(engine) as client:
        await client.post(CHAT, json=ask_about(VIDEO, stream=True))
        await client.post(CHAT, json=ask_about(VIDEO))
        model = {"model": "llava"}
        for stream in ("true", "false"):
            labels = {"route": CHAT, "stream": stream}
            assert value(client, "requests_total", **labels, **model, status_class="2xx") == 1
            assert value(client, "request_duration_seconds_count", **labels) == 1
            assert value(client, "request_duration_seconds_sum", **labels) > 0
        assert value(client, "time_to_first_token_seconds_count", **model) == 1
        assert value(client, "inter_token_latency_seconds_count", **model) == len(TEXT) - 1
        assert 0.02 < value(client, "inter_token_latency_seconds_sum", **model) < 1
        assert value(client, "video_tokens_total", **model, stage="before") == 2 * 6272
        assert value(client, "video_tokens_total", **model, stage="after") == 2 * 627
        assert value(client, "video_retention_ratio_count", **model) == 2
        assert value(client, "video_bytes_sum") == 2 * len(clip())
        assert value(client, "video_duration_seconds_sum") == pytest.approx(4.0)
        for phase in ("parse", "probe", "queue", "connect"):
            assert value(client, "overhead_seconds_count", phase=phase) == 2, phase
        assert value(client, "engine_up", engine="engine-0") == 1


async def test_first_tokens_are_told_apart_up_to_two_minutes(engine):
    async with gateway(engine) as client:
        await client.post(CHAT, json=ask(stream=True))
        assert value(client, "time_to_first_token_seconds_bucket", model="llava", le="120.0") == 1
        assert value(client, "time_to_first_token_seconds_bucket", model="llava", le="90.0") == 1


async def test_the_overhead_does_not_contain_the_wait_for_the_engine(engine):
    engine.delay_seconds = 0.5
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask())
    assert 0 < float(answer.headers["x-aot-gateway-overhead-ms"]) < 250


async def test_outcomes_are_counted_from_zero(engine):
    async with gateway(engine) as client:
        assert value(client, "rejections_total", reason="media_fetch") == 0
        assert value(client, "upstream_retries_total", reason="connect") == 0
        assert value(client, "affinity_total", outcome="hit") == 0


async def test_the_retention_that_aliases_allow_is_a_metric(engine, tmp_path):
    config = tmp_path / "gateway.yaml"
    config.write_text("models: {whole: {engine_model: llava}, fast: {engine_model: llava, max_retention: 0.5}}")
    async with gateway(engine, config=config) as client:
        assert value(client, "video_retention_limit_ratio", model="whole") == 1.0
        assert value(client, "video_retention_limit_ratio", model="fast") == 0.5


async def test_a_tenants_counters_start_at_zero_and_grow_by_its_own_requests(engine, tmp_path):
    keys = {name: new_key() for name in ("acme", "globex")}
    tenants = {name: {"keys": [{"sha256": digest_of(key.encode())}]} for name, key in keys.items()}
    config = tmp_path / "gateway.yaml"
    config.write_text(json.dumps({"tenants": tenants}))

    def used(client, tenant):
        return {unit: value(client, "tenant_usage_total", tenant=tenant, unit=unit) for unit in TENANT_UNITS}

    async with gateway(engine, config=config) as client:
        assert set(used(client, "acme").values()) == set(used(client, "globex").values()) == {0}
        for stream in (True, False):
            headers = {"authorization": f"Bearer {keys['acme']}"}
            answer = await client.post(CHAT, json=ask_about(VIDEO, stream=stream), headers=headers)
            assert answer.status_code == 200
        assert used(client, "acme") == {
            "requests": 2,
            "tokens": 2 * 652,
            "video_seconds": 2 * 2,
            "rate_limited": 0,
            "video_tokens_before": 2 * 6272,
            "video_tokens_after": 2 * 627,
            "video_tokens_saved": 2 * 5645,
        }
        assert set(used(client, "globex").values()) == {0}


WHOLE_SECONDS = 0.5 * ((640 - 627 + 6272) / 640) ** 2
"""For the prompt with all its video tokens, where ten times as many take a hundred times as long."""


@pytest.mark.parametrize(
    ("profile", "before", "after"),
    [
        ({"prefill": {"tokens": [640, 6400], "seconds": [0.5, 50.0]}}, WHOLE_SECONDS, 0.5),
        (
            {"prefill": {"tokens": [640, 6400], "seconds": [0.5, 50.0], "reduction_seconds_per_token": 1e-3}},
            *(WHOLE_SECONDS, 0.5 + 6.272),
        ),
        ({"prefill": {"tokens": [640, 6400], "seconds": [0.5, 50.0]}, "prompt_tokens_details": False}, None, None),
        ({"prefill": {"tokens": [6400, 640], "seconds": [0.5, 50.0]}}, None, None),
        ({"prefill": {"tokens": [], "seconds": []}}, None, None),
        ({"prefill": None}, None, None),
        ({}, None, None),
    ],
)
async def test_the_time_of_prefill_is_what_the_engine_measured(engine, profile, before, after):
    engine.profile = {**ONEVISION, **profile}
    engine.completion = json.dumps({**COMPLETION, "usage": {"prompt_tokens": 640, "total_tokens": 652}}).encode()
    async with gateway(engine) as client:
        assert (await client.post(CHAT, json=ask_about(VIDEO))).status_code == 200
        assert (await client.post("/v1/completions", json={"model": "llava", "prompt": "a"})).status_code == 200
        counted = [value(client, "prefill_seconds_total", model="llava", stage=stage) for stage in ("before", "after")]
        saved = (await client.get("/v1/usage")).json()["total"]["prefill_seconds_saved"]
    assert counted == [before and pytest.approx(before), after and pytest.approx(after)]
    assert saved == pytest.approx((before or 0) - (after or 0), abs=1e-6)
