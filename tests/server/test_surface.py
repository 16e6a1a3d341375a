"""The gateway serves its own routes, and no other route of an engine can be reached through it."""

import asyncio
import json

import pytest

from server.settings import Settings
from tests.server.harness import CHAT, error_of, gateway, served

ENGINES_OWN = [
    "/tokenize",
    "/detokenize",
    "/invocations",
    "/ping",
    "/version",
    "/load",
    "/server_info",
    "/tokenizer_info",
    "/collective_rpc",
    "/sleep",
    "/wake_up",
    "/pause",
    "/reset_prefix_cache",
    "/reset_mm_cache",
    "/update_weights",
    "/start_profile",
    "/pooling",
    "/classify",
    "/score",
    "/v1/score",
    "/rerank",
    "/inference/v1/generate",
    "/v1/embeddings",
    "/v1/audio/transcriptions",
    "/v1/messages",
    "/v1/load_lora_adapter",
    "/v1/completions/render",
    "/v1/chat/completions/render",
    "/v1/chat/completions/batch",
    "/v1/responses/resp_1",
    "/v1/responses/resp_1/cancel",
    "/docs",
]


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
async def test_another_method_is_a_405_in_openais_shape(engine, path):
    async with gateway(engine) as client:
        for method in ("GET", "PUT", "DELETE", "OPTIONS", "HEAD", "TRACE", "PATCH"):
            answer = await client.request(method, path)
            assert answer.status_code == 405
            assert answer.headers["allow"] == "POST"
            if method != "HEAD":
                assert error_of(answer)["code"] == "method_not_allowed"


@pytest.fixture(params=["httptools", "h11"])
async def url(engine, request):
    async with served(Settings(engines=(engine.url,)), http=request.param) as url:
        yield url


async def raw(url, head, body=b"{}"):
    """The status and the error for a raw request line that no client library would send."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    lines = [head, "host: gateway", "connection: close", f"content-length: {len(body)}", "", ""]
    writer.write("\r\n".join(lines).encode() + body)
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    await writer.wait_closed()
    headers, _, content = answer.partition(b"\r\n\r\n")
    return int(headers.split()[1]), content


async def test_everything_else_is_a_404_in_openais_shape(engine, url):
    spellings = [
        "/",
        "/v1",
        f"{CHAT}/",
        f"/{CHAT}",
        "//v1//chat/completions",
        "/v1/chat//completions",
        "/v1/./chat/completions",
        "/v1/x/../chat/completions",
        "/v1/chat/completions/../../../tokenize",
        "/v1/%2e%2e/tokenize",
        "/v1%2Fchat%2Fcompletions%2F",
        "/v1/chat/completions%00",
        "/V1/chat/completions",
        "/%2e/metrics",
        "/health",
    ]
    for path in [*ENGINES_OWN, *spellings]:
        for method in ("GET", "POST", "OPTIONS", "DELETE"):
            status, content = await raw(url, f"{method} {path} HTTP/1.1")
            assert status == 404, (method, path, content)
            assert json.loads(content)["error"]["code"] == "not_found", (method, path)
    assert engine.requests == []


async def test_a_websocket_is_not_opened(engine, url):
    upgrade = "upgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ=="
    for path in ("/v1/realtime", CHAT):
        status, _ = await raw(url, f"GET {path} HTTP/1.1\r\n{upgrade}")
        assert status in (404, 405)


@pytest.mark.parametrize("head", ["POST http://other/v1/chat/completions HTTP/1.1", "CONNECT 10.0.0.1:80 HTTP/1.1"])
async def test_the_gateway_is_no_proxy(engine, url, head):
    status, _ = await raw(url, head)
    assert status in (400, 404, 405)
    assert engine.requests == []
