import pytest

from tests.server.harness import CHAT, error_of, gateway


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
        "/openapi.json",
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
