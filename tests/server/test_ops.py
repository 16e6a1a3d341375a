import json
import logging

import pytest

from server import __version__
from server.observe import logs
from tests.server.harness import CHAT, ask, gateway, until


def up(client):
    return client.registry.get_sample_value("aot_gateway_engine_up", {"engine": "engine-0"})


async def test_models_are_those_of_the_engine_without_its_paths(engine):
    engine.models = ["llava", "org/llava-large"]
    async with gateway(engine) as client:
        listing = (await client.get("/v1/models")).json()
        one = (await client.get("/v1/models/org/llava-large")).json()
    assert listing["object"] == "list"
    assert [card["id"] for card in listing["data"]] == ["llava", "org/llava-large"]
    assert listing["data"][1] == one
    assert one["object"] == "model"
    assert one["max_model_len"] == 4096
    assert isinstance(one["created"], int)
    assert "secret" not in json.dumps(listing)


async def test_aliases_replace_the_engines_models(engine, tmp_path):
    path = tmp_path / "gateway.yaml"
    path.write_text(
        "models: {llava-fast: {engine_model: llava, retention: 0.1, min_retention: 0.05, max_retention: 0.5}}"
    )
    async with gateway(engine, config=path) as client:
        listing = (await client.get("/v1/models")).json()["data"]
        assert [card["id"] for card in listing] == ["llava-fast"]
        bounds = {"retention": 0.1, "min_retention": 0.05, "max_retention": 0.5}
        assert listing[0]["aot"] == {**bounds, "engine_retention": None, "preset": None}
        assert (await client.post(CHAT, json=ask())).status_code == 404
        assert (await client.post(CHAT, json=ask(model="llava-fast"))).status_code == 200
        refused = await client.post(CHAT, json=ask(model="llava-fast", aot={"retention": 0.6}))
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "aot.retention"
        assert "[0.05, 0.5]" in refused.json()["error"]["message"]
    assert [request["model"] for request in engine.requests] == ["llava"]


async def test_an_unknown_model_can_not_be_retrieved(engine):
    async with gateway(engine) as client:
        answer = await client.get("/v1/models/gpt-9")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


async def test_models_are_remembered_while_the_engine_is_down(engine):
    async with gateway(engine, engine_health_seconds=0.05) as client:
        engine.healthy = False
        await until(lambda: up(client) == 0)
        assert (await client.get("/health/ready")).status_code == 503
        assert [card["id"] for card in (await client.get("/v1/models")).json()["data"]] == ["llava"]
        engine.healthy = True
        await until(lambda: up(client) == 1)
        assert (await client.get("/health/ready")).status_code == 200
        assert (await client.post(CHAT, json=ask())).status_code == 200


async def test_alive_and_ready_with_an_engine(engine):
    async with gateway(engine) as client:
        assert (await client.get("/health/live")).json() == {"status": "live"}
        assert (await client.get("/health/ready")).json()["status"] == "ready"


async def test_alive_but_not_ready_without_an_engine():
    async with gateway(engines=("http://127.0.0.1:1",)) as client:
        assert (await client.get("/health/live")).status_code == 200
        ready = await client.get("/health/ready")
    assert ready.status_code == 503
    never_seen = {"engine": "engine-0", "up": False, "failed_checks": []}
    assert ready.json() == {"status": "no healthy engine", "engines": [never_seen]}


async def test_metrics_are_served_with_the_build(engine):
    async with gateway(engine) as client:
        await client.get("/v1/models")
        answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert f'aot_gateway_build_info{{version="{__version__}"}} 1.0' in answer.text
    assert 'route="/v1/models"' in answer.text
    assert "127.0.0.1" not in answer.text


async def test_two_gateways_in_a_process_keep_their_metrics_apart(engine):
    async with gateway(engine) as one, gateway(engine) as other:
        await one.post(CHAT, json=ask())
        labels = {"route": CHAT, "model": "llava", "status_class": "2xx", "stream": "false"}
        assert one.registry.get_sample_value("aot_gateway_requests_total", labels) == 1
        assert other.registry.get_sample_value("aot_gateway_requests_total", labels) is None


@pytest.fixture
def log_lines():
    class Lines(list):
        def write(self, text):
            self.append(text)

        def flush(self):
            pass

    lines = Lines()
    logs.configure("debug", lines)
    yield lines
    for name in ("server", "uvicorn", "asyncio"):
        logging.getLogger(name).handlers = []
        logging.getLogger(name).propagate = True


async def test_the_log_has_a_json_line_for_each_request_without_body_or_key(engine, log_lines, monkeypatch):
    async with gateway(engine) as client:
        headers = {"x-request-id": "r-1", "authorization": "Bearer sk-verysecret"}
        await client.post(CHAT, json=ask(user="private words"), headers=headers)
        monkeypatch.setattr("server.routes.chat.parse_chat_request", lambda body, **_: {}[body.decode()])
        await client.post(CHAT, json=ask(user="private words"), headers={"x-request-id": "r-2"})
    lines = [json.loads(line) for text in log_lines for line in text.splitlines() if line.strip()]
    first = next(line for line in lines if line.get("request_id") == "r-1")
    assert first["event"] == "request"
    assert first["status"] == 200
    assert first["model"] == "llava"
    assert first["video_tokens_before"] == 6272
    failure = next(line for line in lines if line.get("request_id") == "r-2" and line["level"] == "error")
    assert failure["exception"] == "KeyError"
    assert failure["frames"]
    everything = "".join(log_lines)
    assert "private words" not in everything
    assert "sk-verysecret" not in everything
