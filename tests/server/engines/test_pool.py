import asyncio
import json
from contextlib import AsyncExitStack

import httpx
import pytest
from prometheus_client import CollectorRegistry

from server.engines.pool import EnginePool
from server.engines.session import EngineSession
from server.keys import digest_of, new_key
from server.observe.metrics import Metrics
from server.settings import Settings
from tests.server.engine_double import EngineDouble
from tests.server.engines.profiles import ONEVISION
from tests.server.harness import CHAT, ask, error_of, gateway, served, until, until_true, value


async def test_a_request_goes_to_the_other_engine_if_one_cant_be_reached():
    async with (
        EngineDouble().serving() as first,
        EngineDouble().serving() as second,
        gateway(engines=(first.url, second.url), engine_health_seconds=60) as client,
    ):
        # the first engine stops listening after a health check has found it up
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
    await asyncio.sleep(0.1)  # until the gateway's idle connections are closed


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
        for _ in range(2):  # the first request finds out, the second one knows
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


async def test_an_engine_that_refuses_is_passed_over_while_another_takes_requests():
    async with (
        EngineDouble(error=(503, b"", "text/plain")).serving() as busy,
        EngineDouble().serving() as free,
        gateway(engines=(busy.url, free.url), engine_health_seconds=0.1) as client,
    ):
        answers = [await client.post(CHAT, json=ask(stream=i % 2 == 0)) for i in range(8)]
        assert {answer.status_code for answer in answers} == {200}
        assert len(free.requests) == 8
        assert value(client, "upstream_retries_total", reason="refused") >= 3
        assert value(client, "engine_breaker_open", engine="engine-0") == 0
        await until(lambda: value(client, "engine_up", engine="engine-0") == 0)  # it can't answer the gateway either
        busy.error = None
        await until(lambda: value(client, "engine_up", engine="engine-0") == 1)


async def test_when_every_engine_refuses_the_request_has_been_to_each_of_three_at_most_once():
    async with AsyncExitStack() as stack:
        doubles = [
            await stack.enter_async_context(EngineDouble(error=(503, b"", "text/plain")).serving()) for _ in range(4)
        ]
        client = await stack.enter_async_context(gateway(engines=tuple(double.url for double in doubles)))
        answer = await client.post(CHAT, json=ask())
        assert answer.status_code == 503
        assert error_of(answer)["code"] == "engine_unavailable"
        assert answer.headers["retry-after"]
        assert "x-should-retry" not in answer.headers
    assert sorted(len(double.requests) for double in doubles) == [0, 1, 1, 1]


@pytest.mark.parametrize("status", [400, 404, 422, 429, 500, 501, 502])
async def test_no_answer_to_one_client_opens_the_breaker(engine, status):
    engine.error = (status, b'{"error":{"message":"the model x does not exist","code":1}}', "application/json")
    async with gateway(engine, engine_health_seconds=60) as client:
        for number in range(8):
            answer = await client.post(CHAT, json=ask(seed=number))
            assert answer.status_code == (400 if status == 422 else 502 if status >= 500 else status)
        assert value(client, "engine_breaker_open", engine="engine-0") == 0
        assert len(engine.requests) == 8


@pytest.mark.parametrize("stream", [False, True])
async def test_answers_that_break_off_open_the_breaker_also_after_their_first_bytes(engine, stream):
    engine.dies_after = 3
    async with gateway(engine, engine_health_seconds=60) as client:
        for _ in range(3):
            answer = await client.post(CHAT, json=ask(stream=stream))
            assert b'"code":"engine_failed"' in answer.content
        assert value(client, "engine_breaker_open", engine="engine-0") == 1


@pytest.mark.parametrize(
    ("senders", "contents", "opens"),
    [
        (("acme", "globex"), (1, 2), True),
        (("acme", "globex"), (1, 1), False),
        (("acme", "acme"), (1, 2), False),
    ],
    ids=["tenants and contents", "one content", "one tenant"],
)
async def test_errors_open_the_breaker_only_over_tenants_and_contents(engine, tmp_path, senders, contents, opens):
    keys = {name: new_key() for name in ("acme", "globex")}
    tenants = {name: {"keys": [{"sha256": digest_of(key.encode())}]} for name, key in keys.items()}
    config = tmp_path / "gateway.yaml"
    config.write_text(json.dumps({"tenants": tenants}))
    engine.error = (500, b"{}", "application/json")
    async with gateway(engine, config=config, engine_health_seconds=60) as client:
        for sender in senders:
            for content in contents:
                headers = {"authorization": f"Bearer {keys[sender]}"}
                await client.post(CHAT, json=ask(seed=content), headers=headers)
        assert value(client, "engine_breaker_open", engine="engine-0") == opens


async def test_an_engine_that_answers_all_with_errors_is_asked_by_the_gateway_and_taken_out():
    async with (
        EngineDouble(error=(500, b"{}", "application/json")).serving() as broken,
        EngineDouble().serving() as good,
        gateway(engines=(broken.url, good.url), engine_health_seconds=0.1) as client,
    ):
        while value(client, "engine_up", engine="engine-0"):
            assert (await client.post(CHAT, json=ask())).status_code in (200, 502)
        assert {"model": "llava", "prompt": "a", "max_tokens": 1} in broken.requests
        for _ in range(4):
            assert (await client.post(CHAT, json=ask())).status_code == 200
        broken.error = None
        await until(lambda: value(client, "engine_up", engine="engine-0") == 1)


async def test_an_engine_is_not_asked_because_of_requests_that_it_refuses(engine):
    engine.error = (400, b"{}", "application/json")
    async with gateway(engine, engine_health_seconds=0.05) as client:
        for _ in range(5):
            assert (await client.post(CHAT, json=ask())).status_code == 400
        await asyncio.sleep(0.2)
        assert all("messages" in request for request in engine.requests)
        assert value(client, "engine_up", engine="engine-0") == 1


async def test_a_client_that_leaves_says_nothing_about_the_engine(engine):
    engine.hold = asyncio.Event()
    async with served(Settings(engines=(engine.url,))) as url, httpx.AsyncClient() as client:
        for _ in range(5):
            asking = asyncio.create_task(client.post(url + CHAT, json=ask()))
            await until(lambda: engine.running)
            asking.cancel()
            await until(lambda: not engine.running)
        engine.hold.set()
        assert (await client.post(url + CHAT, json=ask())).status_code == 200


async def test_a_request_takes_no_longer_than_the_limits_on_headers_and_on_silence(engine):
    engine.delay_seconds = 0.6
    async with gateway(engine, engine_headers_seconds=0.2, engine_read_seconds=5) as client:
        assert (await client.post(CHAT, json=ask(stream=True))).status_code == 504
        assert (await client.post(CHAT, json=ask())).status_code == 200  # the headers come when the answer is complete


async def test_a_model_that_no_engine_serves_any_more_is_not_sent_to_one(engine, tmp_path):
    path = tmp_path / "gateway.yaml"
    path.write_text("models: {fast: {engine_model: llava}, gone: {engine_model: other}}")
    async with gateway(engine, config=path, engine_health_seconds=0.05) as client:
        answer = await client.post(CHAT, json=ask(model="gone"))
        assert answer.status_code == 503
        assert "serves this model" in error_of(answer)["message"]
        assert (await client.post(CHAT, json=ask(model="fast"))).status_code == 200
        engine.models = ["other"]

        async def served_again():
            return (await client.post(CHAT, json=ask(model="gone"))).status_code == 200

        await until_true(served_again)
        assert (await client.post(CHAT, json=ask(model="fast"))).status_code == 503
    assert {request["model"] for request in engine.requests} == {"llava", "other"}
    assert [request["model"] for request in engine.requests].count("llava") == 1


async def test_an_engine_that_lists_no_models_is_not_up(engine):
    engine.models = []
    async with gateway(engine, engine_health_seconds=0.05) as client:
        assert (await client.get("/health/ready")).status_code == 503
        engine.models = ["llava"]
        await until(lambda: value(client, "engine_up", engine="engine-0") == 1)
        assert (await client.post(CHAT, json=ask())).status_code == 200


async def test_a_silent_engine_does_not_delay_what_is_known_of_the_others(engine, monkeypatch):
    monkeypatch.setattr("server.engines.pool.HEALTH_TIMEOUT_SECONDS", 3)
    async with (
        EngineDouble().serving() as silent,
        gateway(engines=(silent.url, engine.url), engine_health_seconds=0.05) as client,
    ):
        silent.health_hold = asyncio.Event()
        await asyncio.sleep(0.2)  # until the health check hangs
        engine.healthy = False
        async with asyncio.timeout(1):  # a check may hang for three
            await until(lambda: not value(client, "engine_up", engine="engine-1"))
        silent.health_hold.set()


async def test_what_one_api_server_of_an_engine_has_measured_counts_until_the_engine_has_been_down(engine):
    measured = {"tokens": [64, 128], "seconds": [0.5, 1.5]}
    metrics = Metrics(CollectorRegistry())
    async with EngineSession(connect_seconds=1) as session:
        pool = EnginePool([engine.url], session=session, metrics=metrics, health_seconds=60, read_seconds=5)
        found = []
        for told in ({"prefill": measured}, {}, {"prefill": None}, None, {}):
            engine.profile = None if told is None else {**ONEVISION, **told}
            await pool.check()
            found.append(pool.engines[0].profile and pool.engines[0].profile.prefill)
        engine.profile = {**ONEVISION, "prefill": measured}
        await pool.check()
        engine.healthy = False
        await pool.check()
        engine.healthy, engine.profile = True, ONEVISION
        await pool.check()
        found.append(pool.engines[0].profile.prefill)
    assert [one and one.seconds for one in found] == [(0.5, 1.5)] * 3 + [None] * 3
