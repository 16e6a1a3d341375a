import asyncio
import json

import httpx
import pytest

from server.errors import (
    ENGINE_VERDICTS,
    VERDICTS,
    ContextExceeded,
    EngineRefused,
    GatewayError,
    MethodNotAllowed,
    RateLimited,
    answer_to,
)
from tests.server.harness import CHAT, GatewayProcess, ask, error_of, gateway, value


def subclasses(kind):
    return {kind, *(below for child in kind.__subclasses__() for below in subclasses(child))}


def errors():
    """One error of each class, and one for each status of engines' errors."""
    more = {
        MethodNotAllowed: {"allowed": "GET"},
        RateLimited: {"retry_after_seconds": 3},
    }
    yield from (kind("said", **more.get(kind, {})) for kind in VERDICTS)
    yield from (EngineRefused("said", status=status) for status in ENGINE_VERDICTS)
    yield ZeroDivisionError("a secret")


def test_one_table_has_a_status_for_every_error():
    assert set(VERDICTS) == subclasses(GatewayError) - {GatewayError, EngineRefused, ContextExceeded}
    for exc in errors():
        answer = answer_to(exc)
        error = answer.content["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["code"], str | None)
        assert "secret" not in error["message"]
        assert ("retry-after" in answer.headers) == (answer.status in (429, 503))
        assert (answer.headers.get("x-should-retry") == "false") == (answer.status in (500, 502, 504))
        kinds = {429: "rate_limit_error", **dict.fromkeys((500, 502, 503, 504), "server_error")}
        assert error["type"] == kinds.get(answer.status, "invalid_request_error")
        assert json.loads(answer.event().removeprefix(b"data: ")) == answer.content


async def test_every_answer_has_a_request_id_whatever_its_status(engine, tmp_path):
    async def slowly():
        yield b"{"
        await asyncio.sleep(2)

    config = tmp_path / "gateway.yaml"
    config.write_text("limits: {requests_per_minute: 10}")
    async with gateway(engine, config=config, max_body_bytes=2000, body_seconds=0.1) as client:
        for status, method, path, content in (
            (200, "GET", "/health/live", None),
            (200, "GET", "/health/ready", None),
            (200, "GET", "/metrics", None),
            (200, "GET", "/openapi.json", None),
            (200, "GET", "/v1/models", None),
            (200, "POST", CHAT, json.dumps(ask())),
            (200, "POST", CHAT, json.dumps(ask(stream=True))),
            (400, "POST", CHAT, "{"),
            (404, "GET", "/", None),
            (404, "GET", "/v1/models/gpt-9", None),
            (404, "GET", "/v1/files", None),
            (404, "POST", "/v1/embeddings", "{}"),
            (405, "GET", CHAT, None),
            (405, "POST", "/health/live", None),
            (405, "POST", "/metrics", "{}"),
            (405, "HEAD", CHAT, None),
            (408, "POST", CHAT, slowly()),
            (413, "POST", CHAT, b" " * 3000),
            (413, "POST", "/v1/responses", b" " * 3000),
            (429, "POST", CHAT, json.dumps(ask())),
            (429, "GET", "/v1/files", None),
        ):
            answer = await client.request(method, path, content=content, headers={"x-request-id": "mine"})
            assert (answer.status_code, answer.headers["x-request-id"]) == (status, "mine"), (method, path)
            assert float(answer.headers["x-aot-gateway-overhead-ms"]) >= 0
            assert ("retry-after" in answer.headers) == (status in (429, 503))
            if status >= 400 and method != "HEAD":
                error_of(answer)


async def test_over_a_socket_too_and_while_draining(engine):
    engine.delay_seconds = 1
    async with GatewayProcess(engine.url) as gateway, httpx.AsyncClient(base_url=gateway.url) as client:
        last = asyncio.create_task(client.post(CHAT, json=ask()))
        await asyncio.sleep(0.3)
        gateway.drain()
        await asyncio.sleep(0.3)
        for status, method, path in (
            (503, "POST", CHAT),
            (503, "GET", "/v1/models"),
            (503, "GET", "/v1/nothing"),
            (503, "GET", "/health/ready"),
            (404, "GET", "/nothing"),
            (405, "PUT", "/health/live"),
            (200, "GET", "/health/live"),
            (200, "GET", "/metrics"),
        ):
            answer = await client.request(method, path)
            assert answer.status_code == status, (path, answer.text)
            assert answer.headers["x-request-id"].startswith("req_")
            assert ("retry-after" in answer.headers) == (status == 503)
        assert (await last).status_code == 200


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
        (401, b'{"error":"Unauthorized"}', "application/json", 500, "engine_misconfigured", "only the operator"),
        (403, b"", "text/html", 500, "engine_misconfigured", "only the operator"),
        (
            400,
            b'{"error":{"message":"Per-request mm_processor_kwargs are disabled by default because they can change '
            b"multimodal preprocessing resource usage. Start the server with --trust-request-mm-kwargs only when "
            b'clients are trusted.","type":"BadRequestError","param":"mm_processor_kwargs","code":400}}',
            "application/json",
            500,
            "engine_misconfigured",
            "only the operator",
        ),
        (
            400,
            b'{"error":{"message":"Cannot load local files without `--allowed-local-media-path`.","code":400}}',
            "application/json",
            500,
            "engine_misconfigured",
            "only the operator",
        ),
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
    assert ("x-should-retry" in answer.headers) == (seen in (500, 502, 504))


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


async def test_an_unexpected_failure_is_a_500_without_details(engine, monkeypatch):
    async with gateway(engine) as client:
        monkeypatch.setattr("server.routes.chat.parse_chat_request", lambda *_, **__: 1 / 0)
        answer = await client.post(CHAT, json=ask())
    assert answer.status_code == 500
    assert error_of(answer)["message"] == "the gateway failed on this request"
