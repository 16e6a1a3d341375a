"""API keys: over the ASGI app, and in processes where the operator's view is tested."""

import json
import logging
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from starlette.datastructures import Headers

from server.admission.auth import KeyRing
from server.app import create_app
from server.configuration import Key
from server.errors import ConfigurationError, Unauthorized
from server.keys import digest_of, new_key
from server.settings import Settings
from tests.server.harness import CHAT, ask, gateway, served

ROOT = Path(__file__).resolve().parents[3]
ACME, ACME_TOO, OLD, GLOBEX, SCRAPER = (new_key() for _ in range(5))


def bearer(key):
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "gateway.yaml"
    path.write_text(
        f"""
models:
  llava: {{engine_model: llava}}
  llava-fast: {{engine_model: llava, retention: 0.1}}
tenants:
  acme:
    keys:
      - sha256: {digest_of(ACME.encode())}
      - {{sha256: {digest_of(ACME_TOO.encode())}, expires: 2999-01-01}}
      - {{sha256: {digest_of(OLD.encode())}, expires: 2020-01-01T00:00:00Z}}
  globex:
    keys: [{{sha256: {digest_of(GLOBEX.encode())}}}]
    models: [llava-fast]
metrics_keys: [{{sha256: {digest_of(SCRAPER.encode())}}}]
"""
    )
    return path


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({}, "an API key is needed"),
        ({"authorization": "Bearer"}, "an API key is needed"),
        ({"authorization": f"Basic {ACME}"}, "an API key is needed"),
        ({"authorization": ACME}, "an API key is needed"),
        (bearer(new_key()), "not a valid one"),
        (bearer(ACME[:-1]), "not a valid one"),
        (bearer(digest_of(ACME.encode())), "not a valid one"),
        ({"authorization": "Bearer ключ".encode()}, "not a valid one"),
        (bearer(SCRAPER), "not a valid one"),
        (bearer(OLD), "has expired"),
    ],
)
async def test_without_a_valid_key_everything_but_health_is_a_401(engine, config, headers, message):
    async with gateway(engine, config=config) as client:
        answers = [
            await client.post(CHAT, json=ask(), headers=headers),
            await client.get("/v1/models", headers=headers),
            await client.get("/v1/nothing", headers=headers),
            await client.get("/tokenize", headers=headers),
        ]
        assert (await client.get("/health/live", headers=headers)).status_code == 200
        assert (await client.get("/health/ready", headers=headers)).status_code == 200
    for answer in answers:
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        error = answer.json()["error"]
        assert error["code"] == "invalid_api_key"
        assert error["type"] == "invalid_request_error"
        assert message in error["message"]
    assert engine.requests == []


@pytest.mark.parametrize(
    ("sent", "key"),
    [("Bearer {}", ACME), ("bearer   {}", ACME), ("BEARER {} ", ACME_TOO)],
    ids=["as is", "low", "high"],
)
async def test_any_key_of_a_tenant_opens_and_the_scheme_is_read_as_loosely_as_http_wants(engine, config, sent, key):
    async with gateway(engine, config=config) as client:
        answer = await client.post(CHAT, json=ask(), headers={"authorization": sent.format(key)})
    assert answer.status_code == 200
    assert "authorization" not in engine.request_headers[0]


async def test_a_tenant_sees_its_models_only_and_the_others_do_not_exist(engine, config):
    async with gateway(engine, config=config) as client:

        async def listed(key):
            return [card["id"] for card in (await client.get("/v1/models", headers=bearer(key))).json()["data"]]

        assert await listed(ACME) == ["llava", "llava-fast"]
        assert await listed(GLOBEX) == ["llava-fast"]
        hidden = await client.post(CHAT, json=ask(), headers=bearer(GLOBEX))
        unknown = await client.post(CHAT, json=ask(model="gpt-9"), headers=bearer(GLOBEX))
        assert hidden.status_code == unknown.status_code == 404
        assert hidden.json()["error"]["message"].replace("'llava'", "'gpt-9'") == unknown.json()["error"]["message"]
        assert (await client.get("/v1/models/llava", headers=bearer(GLOBEX))).status_code == 404
        assert (await client.get("/v1/models/llava", headers=bearer(ACME))).status_code == 200
        allowed = await client.post(CHAT, json=ask(model="llava-fast"), headers=bearer(GLOBEX))
        assert allowed.status_code == 200


async def test_metrics_open_to_their_own_keys_and_to_no_tenants(engine, config):
    async with gateway(engine, config=config) as client:
        assert (await client.get("/metrics")).status_code == 401
        assert (await client.get("/metrics", headers=bearer(ACME))).status_code == 401
        assert (await client.get("/metrics", headers=bearer(SCRAPER))).status_code == 200


async def test_keys_are_in_no_answer_no_metric_and_no_log(engine, config, caplog):
    caplog.set_level(logging.DEBUG)
    stranger = new_key()
    async with gateway(engine, config=config) as client:
        answers = [await client.post(CHAT, json=ask(), headers=bearer(key)) for key in (ACME, OLD, stranger)]
        answers.append(await client.get("/metrics", headers=bearer(SCRAPER)))
    logged = [json.dumps(record.__dict__, default=str) for record in caplog.records]
    everything = "".join([*(f"{answer.headers} {answer.text}" for answer in answers), *logged])
    for key in (ACME, OLD, stranger, SCRAPER):
        assert key not in everything
        assert digest_of(key.encode()) not in everything
    assert any(record.__dict__.get("tenant") == "acme" for record in caplog.records)


def test_an_expired_key_was_valid_the_moment_before():
    ring = KeyRing(
        [(Key(sha256=digest_of(b"k"), expires=datetime(2030, 1, 1, tzinfo=UTC)), "acme")],
        clock=lambda: datetime(2029, 12, 31, 23, 59, 59, tzinfo=UTC),
    )
    assert ring.holder(Headers({"authorization": "Bearer k"})) == "acme"
    with pytest.raises(Unauthorized):
        KeyRing([(Key(sha256=digest_of(b"k"), expires=datetime(2020, 1, 1, tzinfo=UTC)), "acme")]).holder(
            Headers({"authorization": "Bearer k"})
        )


async def test_the_engines_get_their_own_key_from_its_file(engine, tmp_path):
    path = tmp_path / "engine.key"
    path.write_text("engine-secret\n")
    async with gateway(engine, engine_key_file=path) as client:
        assert (await client.post(CHAT, json=ask(), headers=bearer(ACME))).status_code == 200
    assert engine.request_headers[0]["authorization"] == "Bearer engine-secret"


async def test_over_sockets_a_refused_upload_gets_its_401(engine, config):
    async with served(Settings(engines=(engine.url,), config=config)) as url, httpx.AsyncClient(timeout=20) as client:
        answer = await client.post(url + CHAT, content=b" " * 10**6)
    assert answer.status_code == 401


def test_the_command_makes_another_key_each_time_and_prints_its_hash():
    outputs = [
        subprocess.run(
            [sys.executable, "-m", "server.keys"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    pairs = [re.search(r"key: +(\S+)\nsha256: ([0-9a-f]{64})\n", output).groups() for output in outputs]
    assert all(digest_of(key.encode()) == digest for key, digest in pairs)
    assert pairs[0][0] != pairs[1][0]


def test_off_loopback_without_keys_the_start_is_refused_and_the_ways_out_are_named(config):
    with pytest.raises(ConfigurationError) as caught:
        create_app(Settings(host="0.0.0.0"))
    assert all(name in str(caught.value) for name in ("AOT_GATEWAY_CONFIG", "127.0.0.1", "AOT_GATEWAY_ALLOW_OPEN=true"))
    create_app(Settings(host="0.0.0.0", config=config))
    create_app(Settings(host="0.0.0.0", allow_open=True))


@pytest.mark.parametrize("content", [b"", b"  \n", b"two words", b"\xff\xfe", b"a\nb"])
def test_an_engine_key_file_that_holds_no_key_stops_the_start_without_being_quoted(tmp_path, content):
    path = tmp_path / "engine.key"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match="must be a readable file with an API key") as caught:
        create_app(Settings(engine_key_file=path))
    assert "words" not in str(caught.value)
