"""Each reason of `rejections_total` is counted, by a request that ends for that reason."""

import asyncio
import json

import httpx
import pytest
from prometheus_client import CollectorRegistry

from server.admission.drain import Drain
from server.app import create_app
from server.errors import REASONS
from server.keys import digest_of, new_key
from server.settings import Settings
from tests.server.clips import clip, data_url
from tests.server.engine_double import EngineDouble
from tests.server.harness import CHAT, ask, ask_about, client_of, free_port, gateway, served, until, value
from tests.server.media.hosts import MediaHost

KEY = new_key()
BEARER = {"authorization": f"Bearer {KEY}"}


async def slowly():
    yield b"{"
    await asyncio.sleep(1)


class Scene:
    """An engine and what a reason needs: settings, tenants, and a function that sends the request."""

    def __init__(self, engine, host, folder):
        self.engine, self.host = engine, host
        self.config = folder / "gateway.yaml"
        self.settings = {"files_dir": folder / "files", "media_allow_hosts": (host.host,), "media_allow_http": True}
        self.settings["files_dir"].mkdir()

    def configured(self, **content):
        self.config.write_text(json.dumps(content))
        self.settings["config"] = self.config

    async def post(self, client, **fields):
        return await client.post(CHAT, json=ask(**fields))


async def invalid_request(scene, client):
    return await client.post(CHAT, content=b"{")


async def forbidden_field(scene, client):
    return await scene.post(client, mm_processor_kwargs={})


async def retention(scene, client):
    return await scene.post(client, aot={"retention": 2})


async def sampling(scene, client):
    return await client.post(CHAT, json=ask_about(data_url(clip()), aot={"frames": 3}))


async def media(scene, client):
    return await client.post(CHAT, json=ask_about("data:video/mp4;base64,AAAA"))


async def media_fetch(scene, client):
    return await client.post(CHAT, json=ask_about(f"{scene.host.url}/missing.mp4"))


async def unauthorized(scene, client):
    return await scene.post(client)


async def not_found(scene, client):
    return await client.get("/v1/nothing")


async def unknown_model(scene, client):
    return await scene.post(client, model="gpt-9")


async def unknown_file(scene, client):
    return await client.get("/v1/files/file-0123456789abcdef")


async def body_timeout(scene, client):
    return await client.post(CHAT, content=slowly())


async def body_too_large(scene, client):
    return await client.post(CHAT, content=b" " * 3000)


async def rate_limited(scene, client):
    await scene.post(client)
    return await scene.post(client)


async def queue_full(scene, client):
    scene.engine.hold = asyncio.Event()
    running = asyncio.create_task(scene.post(client))
    await until(lambda: scene.engine.running)
    answer = await scene.post(client)
    scene.engine.hold.set()
    await running
    return answer


async def no_engine(scene, client):
    scene.engine.healthy = False
    await until(lambda: value(client, "engine_up", engine="engine-0") == 0)
    return await scene.post(client)


async def usage_unavailable(scene, client):
    return await client.get("/v1/usage")


async def misconfigured(scene, client):
    return await scene.post(client, model="gone")


async def engine_failed(scene, client):
    scene.engine.dies_after = 0
    return await scene.post(client)


async def engine_timeout(scene, client):
    scene.engine.delay_seconds = 1
    return await scene.post(client)


async def engine_refused(scene, client):
    scene.engine.error = (400, b'{"error":{"message":"no","code":400}}', "application/json")
    return await scene.post(client)


CASES = {
    **{it: {} for it in (invalid_request, forbidden_field, retention, sampling, media, media_fetch)},
    **{it: {} for it in (not_found, unknown_model, unknown_file, engine_failed, engine_refused)},
    unauthorized: {"tenants": {"acme": {"keys": [{"sha256": digest_of(KEY.encode())}]}}},
    rate_limited: {"limits": {"requests_per_minute": 1}},
    misconfigured: {"models": {"gone": {"engine_model": "another"}}},
    body_timeout: {"body_seconds": 0.1},
    body_too_large: {"max_body_bytes": 2000},
    queue_full: {"max_concurrency": 1, "max_queue": 0},
    no_engine: {"engine_health_seconds": 0.05},
    engine_timeout: {"engine_read_seconds": 0.2},
    usage_unavailable: {"limits_backend": f"redis://127.0.0.1:{free_port()}/0"},
}
STATUS = {
    **dict.fromkeys((invalid_request, forbidden_field, retention, sampling, media, media_fetch, engine_refused), 400),
    unauthorized: 401,
    **dict.fromkeys((not_found, unknown_model, unknown_file), 404),
    body_timeout: 408,
    body_too_large: 413,
    rate_limited: 429,
    queue_full: 429,
    engine_failed: 502,
    no_engine: 503,
    usage_unavailable: 503,
    misconfigured: 503,
    engine_timeout: 504,
}
ELSEWHERE = {"internal", "client_gone", "draining"}
"""Reasons that need more than one request of a client of the application: see the tests below."""


def counted(registry):
    return {reason: registry.get_sample_value("aot_gateway_rejections_total", {"reason": reason}) for reason in REASONS}


def test_every_reason_has_its_test():
    assert {it.__name__ for it in CASES} | ELSEWHERE == set(REASONS)


@pytest.mark.parametrize("sent", CASES, ids=lambda it: it.__name__)
async def test_a_request_that_ends_for_a_reason_is_counted_under_it_alone(sent, tmp_path, caplog):
    caplog.set_level("INFO", logger="server")
    async with EngineDouble().serving() as engine, MediaHost().serving() as host:
        scene = Scene(engine, host, tmp_path)
        special = CASES[sent]
        if special.keys() & {"tenants", "limits", "models"}:
            scene.configured(**special)
        else:
            scene.settings |= special
        async with gateway(engine, **scene.settings) as client:
            answer = await sent(scene, client)
            assert answer.status_code == STATUS[sent]
            assert counted(client.registry) == dict.fromkeys(REASONS, 0) | {sent.__name__: 1}
    logged = [record.reason for record in caplog.records if record.getMessage() == "request" and record.reason]
    assert logged == [sent.__name__]


async def test_an_unexpected_failure_is_counted(engine, monkeypatch):
    async with gateway(engine) as client:
        monkeypatch.setattr("server.routes.chat.parse_chat_request", lambda *_, **__: 1 / 0)
        assert (await client.post(CHAT, json=ask())).status_code == 500
        assert counted(client.registry) == dict.fromkeys(REASONS, 0) | {"internal": 1}


async def test_a_client_that_leaves_is_counted(engine):
    registry = CollectorRegistry()
    engine.hold = asyncio.Event()
    async with served(Settings(engines=(engine.url,)), registry) as url, httpx.AsyncClient() as client:
        asking = asyncio.create_task(client.post(url + CHAT, json=ask()))
        await until(lambda: engine.running)
        asking.cancel()
        await until(lambda: counted(registry)["client_gone"])
        engine.hold.set()
    assert counted(registry) == dict.fromkeys(REASONS, 0) | {"client_gone": 1}


async def test_a_request_to_a_gateway_that_drains_is_counted(engine):
    registry, drain = CollectorRegistry(), Drain(30)
    app = create_app(Settings(engines=(engine.url,)), registry=registry, drain=drain)
    async with app.router.lifespan_context(app), client_of(app) as client:
        drain.begin()
        assert (await client.post(CHAT, json=ask())).status_code == 503
    assert counted(registry) == dict.fromkeys(REASONS, 0) | {"draining": 1}
