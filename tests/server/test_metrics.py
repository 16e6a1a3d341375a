import pytest

from tests.server.clips import clip, data_url
from tests.server.engine_double import TEXT
from tests.server.harness import CHAT, ask, ask_about, gateway, value

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
