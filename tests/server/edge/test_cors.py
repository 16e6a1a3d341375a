"""Web pages may call the gateway from the origins that the operator lists, and from no others."""

import json

import pytest

from server.keys import digest_of, new_key
from tests.server.harness import CHAT, ask, gateway

PAGE = "https://app.example.com"


def asks_first(origin=PAGE, method="POST", headers="authorization,content-type,x-request-id"):
    """The headers of a browser's preflight."""
    return {
        "origin": origin,
        "access-control-request-method": method,
        "access-control-request-headers": headers,
    }


@pytest.fixture
def config(tmp_path):
    key, path = new_key(), tmp_path / "gateway.yaml"
    path.write_text(json.dumps({"tenants": {"acme": {"keys": [{"sha256": digest_of(key.encode())}]}}}))
    return key, path


async def test_by_default_no_page_may_call(engine):
    async with gateway(engine) as client:
        first = await client.options(CHAT, headers=asks_first())
        answer = await client.post(CHAT, json=ask(), headers={"origin": PAGE})
    assert first.status_code == 405
    for headers in (first.headers, answer.headers):
        assert not [name for name in headers if name.startswith("access-control")]


async def test_a_page_of_a_listed_origin_may_call_with_its_key(engine, config):
    key, path = config
    async with gateway(engine, config=path, cors_origins=(PAGE,)) as client:
        for method in ("GET", "POST", "DELETE"):
            first = await client.options(CHAT, headers=asks_first(method=method))
            assert first.status_code == 200, first.text
            assert first.headers["access-control-allow-origin"] == PAGE
            assert method in first.headers["access-control-allow-methods"]
            assert "authorization" in first.headers["access-control-allow-headers"]
        answer = await client.post(CHAT, json=ask(), headers={"origin": PAGE, "authorization": f"Bearer {key}"})
        refused = await client.post(CHAT, json=ask(), headers={"origin": PAGE})
    assert (answer.status_code, refused.status_code) == (200, 401)
    for told in (answer, refused):  # a page can read errors too
        assert told.headers["access-control-allow-origin"] == PAGE
        assert "access-control-allow-credentials" not in told.headers
        exposed = told.headers["access-control-expose-headers"].split(", ")
        assert {"x-request-id", "retry-after", "x-aot-video-tokens-after", "x-ratelimit-reset-requests"} <= {*exposed}


async def test_a_page_of_another_origin_may_not(engine):
    async with gateway(engine, cors_origins=(PAGE,)) as client:
        for origin in (
            "https://evil.example",
            "http://app.example.com",
            "https://app.example.com.evil.example",
            "null",
        ):
            assert (await client.options(CHAT, headers=asks_first(origin))).status_code == 400
            answer = await client.post(CHAT, json=ask(), headers={"origin": origin})
            assert "access-control-allow-origin" not in answer.headers


async def test_all_origins_may_be_listed_by_a_star(engine):
    async with gateway(engine, cors_origins=("*",)) as client:
        for origin in (PAGE, "http://localhost:3000"):
            assert (await client.options(CHAT, headers=asks_first(origin))).status_code == 200
            answer = await client.post(CHAT, json=ask(), headers={"origin": origin})
            assert answer.headers["access-control-allow-origin"] == "*"
