import asyncio
import json

import httpx
import pytest

from tests.server.clips import clip, data_url
from tests.server.engine_double import COMPLETION, DONE, ROLE, TEXT, USAGE, EngineDouble, chunk
from tests.server.harness import CHAT, ask, ask_about, gateway, until

VIDEO = data_url(clip())


def value(client, name, **labels):
    return client.registry.get_sample_value(f"aot_gateway_{name}", labels)


def error_of(answer: httpx.Response):
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert isinstance(error["code"], str | None)
    assert answer.headers["x-request-id"]
    assert float(answer.headers["x-aot-gateway-overhead-ms"]) >= 0
    return error


async def test_an_answer_is_the_engines_with_the_savings_added(engine):
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask_about(VIDEO, temperature=0, aot={"retention": 0.1}))
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    expected = json.loads(json.dumps(COMPLETION))
    expected["usage"]["video_tokens"] = {"before": 6272, "after": 627, "retention": 0.1}
    assert answer.json() == expected
    assert answer.headers["x-aot-video-tokens-before"] == "6272"
    assert answer.headers["x-aot-video-tokens-after"] == "627"
    assert answer.headers["x-aot-video-retention"] == "0.1"
    assert float(answer.headers["x-aot-gateway-overhead-ms"]) > 0
    assert engine.requests == [ask_about(VIDEO, temperature=0, mm_processor_kwargs={"aot_retention": 0.1})]


async def test_an_answer_about_text_is_the_engines_byte_for_byte(engine):
    engine.headers = {}
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask(aot={"retention": 0.3}))
    assert answer.content == engine.completion
    assert not [name for name in answer.headers if name.startswith("x-aot-video")]
    assert engine.requests == [ask()]


@pytest.mark.parametrize(
    "headers",
    [
        {"x-aot-video-tokens-before": "many", "x-aot-video-tokens-after": "1"},
        {"x-aot-video-tokens-before": "10"},
        {"x-aot-video-tokens-before": "10", "x-aot-video-tokens-after": "11"},
        {"x-aot-video-tokens-before": "10", "x-aot-video-tokens-after": "1", "x-aot-video-retention": "nan"},
    ],
)
async def test_counts_that_make_no_sense_are_not_passed_on(engine, headers):
    engine.headers = headers
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask())
    assert answer.content == engine.completion


async def test_nothing_of_the_clients_headers_reaches_the_engine_but_the_request_id(engine):
    async with gateway(engine) as client:
        await client.post(CHAT, json=ask(), headers={"authorization": "Bearer sk-secret", "x-request-id": "abc-1"})
    assert engine.request_headers[0]["x-request-id"] == "abc-1"
    assert "sk-secret" not in str(engine.request_headers)


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


async def test_a_stream_is_the_engines_with_the_usage_chunk_hidden(engine):
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask_about(VIDEO, stream=True))
    assert answer.content == b"".join([ROLE, *TEXT, DONE])
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["x-aot-video-tokens-before"] == "6272"
    assert engine.requests[0]["stream_options"] == {"include_usage": True}


async def test_a_stream_with_usage_has_the_savings_in_its_usage_chunk(engine):
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask_about(VIDEO, stream=True, stream_options={"include_usage": True}))
    start = b"".join([ROLE, *TEXT])
    assert answer.content.startswith(start)
    usage = json.loads(answer.content.removeprefix(start).removesuffix(DONE).removeprefix(b"data: "))["usage"]
    assert usage["video_tokens"] == {"before": 6272, "after": 627, "retention": 0.1}
    assert usage["prompt_tokens"] == 640


async def test_a_stream_about_text_is_the_engines_byte_for_byte(engine):
    engine.headers = {}
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask(stream=True, stream_options={"include_usage": True}))
    assert answer.content == b"".join(engine.pieces)


@pytest.mark.parametrize("dies_after", [0, 1, 3])
async def test_a_stream_that_breaks_ends_with_an_error_and_without_done(engine, dies_after):
    engine.dies_after = dies_after
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask(stream=True))
        assert answer.content.startswith(b"".join(engine.pieces[:dies_after]))
        error = json.loads(answer.content.removeprefix(b"".join(engine.pieces[:dies_after])).removeprefix(b"data: "))
        assert error["error"]["type"] == "server_error"
        assert error["error"]["code"] == "engine_failed"
        assert b"[DONE]" not in answer.content
        assert b"127.0.0.1" not in answer.content
        labels = {"route": CHAT, "model": "llava", "status_class": "5xx", "stream": "true"}
        assert value(client, "requests_total", **labels) == 1
        assert value(client, "rejections_total", reason="engine_failed") == 1


async def test_a_stream_that_ends_early_but_politely_is_a_failure_too(engine):
    engine.pieces = [ROLE, *TEXT]
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask(stream=True))
    assert answer.content.startswith(b"".join([ROLE, *TEXT]) + b'data: {"error":')


async def test_an_engine_silent_in_a_stream_times_out(engine):
    engine.hold = asyncio.Event()
    async with gateway(engine, engine_read_seconds=0.3) as client:
        answer = await client.post(CHAT, json=ask(stream=True))
    assert b'"code":"engine_timeout"' in answer.content
    await asyncio.wait_for(engine.aborted.wait(), 5)


async def test_an_engine_that_answers_a_stream_with_json_has_failed(engine):
    engine.error = (200, b"{}", "application/json")
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask(stream=True))
    assert answer.status_code == 502
    assert error_of(answer)["code"] == "engine_failed"


async def test_an_engine_too_slow_to_answer_times_out_and_a_retry_is_discouraged(engine):
    engine.delay_seconds = 5
    async with gateway(engine, engine_read_seconds=0.2) as client:
        answer = await client.post(CHAT, json=ask())
    assert answer.status_code == 504
    assert error_of(answer)["code"] == "engine_timeout"
    assert answer.headers["x-should-retry"] == "false"


async def test_an_engine_that_dies_on_a_request_is_a_502_and_a_retry_is_discouraged(engine):
    engine.dies_after = 0
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask())
    assert answer.status_code == 502
    assert error_of(answer)["code"] == "engine_failed"
    assert answer.headers["x-should-retry"] == "false"
    assert len(engine.requests) == 1


LONG = b"This model's maximum context length is 4096 tokens. However, you requested 9000 tokens."


@pytest.mark.parametrize(
    ("status", "body", "kind", "seen", "code", "text"),
    [
        (
            400,
            b'{"error":{"message":"' + LONG + b'","type":"BadRequestError","param":"messages","code":400}}',
            "application/json",
            400,
            "context_length_exceeded",
            "maximum context length",
        ),
        (
            422,
            b'{"error":{"message":"bad video","type":"X","param":null,"code":422}}',
            "application/json",
            400,
            None,
            "bad",
        ),
        (422, b'{"detail":[{"loc":["body","n"],"msg":"too many"}]}', "application/json", 400, None, "too many"),
        (400, b'{"detail":"There was an error parsing the body"}', "application/json", 400, None, "parsing the body"),
        (400, b'{"object":"error","message":"old shape","code":40001}', "application/json", 400, None, "old shape"),
        (
            404,
            b'{"error":{"message":"The model `x` does not exist.","type":"NotFoundError","code":404}}',
            "application/json",
            404,
            "model_not_found",
            "does not exist",
        ),
        (404, b'{"detail":"Not Found"}', "application/json", 502, "engine_failed", "does not serve"),
        (401, b'{"error":"Unauthorized"}', "application/json", 502, "engine_failed", "failed"),
        (500, b'{"error":{"message":"CUDA at /opt/x","code":500}}', "application/json", 502, "engine_failed", "failed"),
        (503, b"<html>nginx</html>", "text/html", 503, "engine_unavailable", "not taking requests"),
        (504, b"<html>nginx</html>", "text/html", 504, "engine_timeout", "in time"),
        (400, b"<html>nginx at 10.0.0.1</html>", "text/html", 400, None, "refused"),
        (429, b'{"error":{"message":"queue","code":429}}', "application/json", 429, "rate_limit_exceeded", "queue"),
        (302, b"", "text/html", 502, "engine_failed", "failed"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_engines_error_is_told_in_openais_words(engine, status, body, kind, seen, code, text, stream):
    engine.error = (status, body, kind)
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask(stream=stream))
    error = error_of(answer)
    assert answer.status_code == seen
    assert error["code"] == code
    assert text in error["message"]
    assert ("retry-after" in answer.headers) == (seen in (429, 503))
    assert ("x-should-retry" in answer.headers) == (seen in (502, 504))


@pytest.mark.parametrize(
    "leak",
    [
        "http://10.1.2.3:8000/v1",
        "/home/engine/.cache/video.mp4",
        "10.1.2.3:8000",
        "engine-0.internal:8000",
        "[fd00::1]:8000",
        "fd00:0:0:1::7",
        "sk-abcdef123456",
        "hf_abcdefghijk",
        "Bearer abc.def",
        "file:///media/ab12.mp4",
    ],
)
async def test_an_engines_error_leaks_nothing(engine, leak):
    message = f"Failed to load '{leak}' for the request"
    engine.error = (400, json.dumps({"error": {"message": message, "code": 400}}).encode(), "application/json")
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask())
    assert leak not in answer.text
    assert "for the request" in answer.text


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "HEAD"])
async def test_another_method_is_a_405_in_openais_shape(engine, method):
    async with gateway(engine) as client:
        answer = await client.request(method, CHAT)
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    if method != "HEAD":
        assert error_of(answer)["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1",
        "/v1/chat/completions/",
        "//v1/chat/completions",
        "/v1/chat/%63ompletions/x",
        "/tokenize",
        "/invocations",
        "/collective_rpc",
        "/inference/v1/generate",
        "/v1/completions",
        "/v1/embeddings",
        "/docs",
        "/version",
    ],
)
async def test_everything_else_is_a_404_in_openais_shape(engine, path):
    async with gateway(engine) as client:
        for method in ("GET", "POST"):
            answer = await client.request(method, f"http://gateway{path}")
            assert answer.status_code == 404, (method, answer.text)
            assert error_of(answer)["type"] == "invalid_request_error"
    assert engine.requests == []


async def test_an_unknown_model_is_a_404_and_counted_as_other(engine):
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask(model="gpt-9"))
        assert answer.status_code == 404
        assert error_of(answer) | {"message": ""} == {
            "message": "",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
        labels = {"route": CHAT, "model": "other", "status_class": "4xx", "stream": "false"}
        assert value(client, "requests_total", **labels) == 1
        assert value(client, "rejections_total", reason="unknown_model") == 1


@pytest.mark.parametrize(
    ("fields", "reason", "param"),
    [
        ({"mm_processor_kwargs": {}}, "forbidden_field", "mm_processor_kwargs"),
        ({"aot": {"retention": 2}}, "retention", "aot.retention"),
        ({"stream": "yes"}, "invalid_request", "stream"),
    ],
)
async def test_a_refusal_names_the_parameter_and_is_counted_by_reason(engine, fields, reason, param):
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask(**fields))
        assert answer.status_code == 400
        assert error_of(answer)["param"] == param
        assert value(client, "rejections_total", reason=reason) == 1
    assert engine.requests == []


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


async def test_an_unexpected_failure_is_a_500_without_details(engine, monkeypatch):
    async with gateway(engine) as client:
        monkeypatch.setattr("server.routes.chat.parse_chat_request", lambda *_, **__: 1 / 0)
        answer = await client.post(CHAT, json=ask())
    assert answer.status_code == 500
    assert error_of(answer)["message"] == "the gateway failed on this request"


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


async def test_a_request_goes_to_the_other_engine_if_one_cant_be_reached():
    async with (
        EngineDouble().serving() as first,
        EngineDouble().serving() as second,
        gateway(engines=(first.url, second.url), engine_health_seconds=60) as client,
    ):
        # the first stops listening after the health check that found it up
        await stop(first)
        answer = await client.post(CHAT, json=ask())
        assert answer.status_code == 200
        assert len(second.requests) == 1
        assert value(client, "upstream_retries_total", reason="connect") == 1
        assert value(client, "engine_up", engine="engine-0") == 0
        await client.post(CHAT, json=ask())
        assert value(client, "upstream_retries_total", reason="connect") == 1


async def stop(double: EngineDouble) -> None:
    await double.runner.cleanup()
    await asyncio.sleep(0.1)  # until idle connections have heard of it


async def test_an_engine_that_took_the_request_is_not_retried_elsewhere():
    async with (
        EngineDouble(dies_after=0).serving() as first,
        EngineDouble(dies_after=0).serving() as second,
        gateway(engines=(first.url, second.url)) as client,
    ):
        answer = await client.post(CHAT, json=ask())
    assert answer.status_code == 502
    assert len(first.requests) + len(second.requests) == 1


async def test_requests_spread_to_the_engine_with_the_fewest():
    hold = asyncio.Event()
    async with (
        EngineDouble(hold=hold).serving() as first,
        EngineDouble(hold=hold).serving() as second,
        gateway(engines=(first.url, second.url)) as client,
    ):
        running = [asyncio.create_task(client.post(CHAT, json=ask())) for _ in range(6)]
        await until(lambda: first.running + second.running == 6)
        assert first.running == second.running == 3
        hold.set()
        await asyncio.gather(*running)


async def test_requests_go_to_the_engine_that_serves_the_model():
    async with (
        EngineDouble(models=["a"]).serving() as first,
        EngineDouble(models=["b"]).serving() as second,
        gateway(engines=(first.url, second.url)) as client,
    ):
        for _ in range(2):
            assert (await client.post(CHAT, json=ask(model="b"))).status_code == 200
        listed = [card["id"] for card in (await client.get("/v1/models")).json()["data"]]
    assert len(second.requests) == 2
    assert first.requests == []
    assert sorted(listed) == ["a", "b"]


async def test_without_a_reachable_engine_requests_are_refused_and_may_be_retried(engine):
    async with gateway(engine, engine_health_seconds=60) as client:
        await stop(engine)
        for _ in range(2):  # found out by the first, known to the second
            answer = await client.post(CHAT, json=ask())
            assert answer.status_code == 503
            assert error_of(answer)["code"] == "engine_unavailable"
            assert int(answer.headers["retry-after"]) >= 1
            assert "x-should-retry" not in answer.headers
            assert "127.0.0.1" not in answer.text


async def test_an_engine_that_was_never_seen_does_not_make_its_models_unknown():
    async with gateway(engines=("http://127.0.0.1:1",)) as client:
        assert (await client.post(CHAT, json=ask())).status_code == 503
        assert (await client.get("/v1/models")).json() == {"object": "list", "data": []}


async def test_a_large_body_reaches_the_engine_whole(engine):
    engine.headers = {}
    text = "ä" * (3 * 2**20)
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask(note=text))
    assert answer.status_code == 200
    assert engine.requests == [ask(note=text)]
    assert "transfer-encoding" not in engine.request_headers[0]


async def test_several_usage_like_chunks_in_one_read_are_told_apart(engine):
    engine.pieces = [ROLE + TEXT[0] + chunk(choices=[], usage={"prompt_tokens": 1}) + DONE]
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask(stream=True))
    assert answer.content == ROLE + TEXT[0] + DONE
    assert USAGE not in answer.content


async def test_an_engine_that_does_not_report_a_videos_tokens_is_named_in_the_log_once_until_it_does(engine, caplog):
    def said():
        return [record for record in caplog.records if "reports no video tokens" in record.message]

    reported = dict(engine.headers)
    async with gateway(engine) as client:
        for headers, lines in (({}, 1), ({}, 1), (reported, 1), ({}, 2)):
            engine.headers = dict(headers)
            answer = await client.post(CHAT, json=ask_about(VIDEO, aot={"retention": 0.1}))
            assert answer.status_code == 200
            assert len(said()) == lines
        engine.headers = dict(reported)
        await client.post(CHAT, json=ask_about(VIDEO))
        engine.headers = {}
        await client.post(CHAT, json=ask())  # about text there is nothing to report
        assert len(said()) == 2
    assert said()[0].engine == "engine-0"
