"""The gateway examines its engines, and what is wrong with the set-up is never a client's fault."""

import asyncio
import json

import pytest

from server.engines.check import REMEDIES, Wanted, examine
from server.engines.profile import read_profile
from tests.server.clips import clip, data_url
from tests.server.engine_double import EngineDouble
from tests.server.engines.profiles import ONEVISION
from tests.server.harness import CHAT, ask, ask_about, error_of, gateway, until, value

UNTRUSTED = (
    b'{"error":{"message":"Per-request mm_processor_kwargs are disabled by default because they can change multimodal '
    b'preprocessing resource usage. Start the server with --trust-request-mm-kwargs only when clients are trusted.",'
    b'"type":"BadRequestError","param":"mm_processor_kwargs","code":400}}'
)
VIDEO = data_url(clip())
ALLOWING = {"reduction": {"active": True, "retention": 0.1, "preset": "diverse", "presets": ["diverse", "paper"]}}
GOOD = dict.fromkeys(REMEDIES, True)


def examined(wanted, *, takes_key=True, models=("llava",), **told):
    return examine(wanted, takes_key=takes_key, models=models, profile=read_profile({**ONEVISION, **told}))


@pytest.mark.parametrize(
    ("told", "wanted", "failed"),
    [
        ({}, Wanted(), None),
        ({}, Wanted(models=frozenset({"other", "llava"})), None),
        ({}, Wanted(models=frozenset({"other"})), "models"),
        ({"frames_format": 2}, Wanted(), "frames"),
        ({"reduction": {"active": False}}, Wanted(), "reduction"),
        ({"reduction": {"active": False}}, Wanted(presets=frozenset({("llava", "paper")})), "reduction"),
        (ALLOWING, Wanted(presets=frozenset({("llava", "paper"), ("llava", "diverse")})), None),
        (ALLOWING, Wanted(presets=frozenset({("llava", "paper"), ("llava", "other")})), "presets"),
        (ALLOWING, Wanted(presets=frozenset({("another", "other")})), None),
        ({}, Wanted(presets=frozenset({("llava", "paper")})), "presets"),
        ({"request_kwargs_trusted": False}, Wanted(), "request_kwargs"),
        ({"prompt_tokens_details": False}, Wanted(), "prompt_details"),
        ({"limits": {"media_decode_bytes": 999}}, Wanted(decoded_bytes=1000), "limits"),
        ({"limits": {"media_decode_bytes": 1000}}, Wanted(decoded_bytes=1000), None),
        ({"context_length": 1000}, Wanted(output_tokens=1000), "limits"),
    ],
)
def test_each_check_fails_for_its_own_reason(told, wanted, failed):
    assert examined(wanted, **told) == GOOD | ({} if failed is None else {failed: False})


def test_an_engine_that_tells_nothing_fails_one_check_and_the_rest_is_unknown():
    outcomes = examine(Wanted(), takes_key=True, models=["llava"], profile=None)
    assert outcomes == {"key": True, "models": True, "plugin": False}


def test_an_engine_that_refuses_the_key_fails_that_check():
    assert examined(Wanted(), takes_key=False) == {"key": False}


def state_of(ready):
    return {engine["engine"]: (engine["up"], engine["failed_checks"]) for engine in ready.json()["engines"]}


async def test_a_check_that_fails_is_in_the_metrics_in_readiness_and_in_the_log(caplog):
    caplog.set_level("INFO", logger="server")
    async with (
        EngineDouble(profile=ONEVISION).serving() as good,
        EngineDouble(profile={**ONEVISION, "request_kwargs_trusted": False}).serving() as bad,
        gateway(engines=(good.url, bad.url)) as client,
    ):
        for check in REMEDIES:
            assert value(client, "engine_check", engine="engine-0", check=check) == 1
            assert value(client, "engine_check", engine="engine-1", check=check) == (check != "request_kwargs")
        ready = await client.get("/health/ready")
        assert state_of(ready) == {"engine-0": (True, []), "engine-1": (True, ["request_kwargs"])}
        assert "0.32" not in ready.text  # the path needs no key
    examined_lines = [record for record in caplog.records if record.getMessage() == "engine examined"]
    assert {line.engine: line.failed_checks for line in examined_lines} == {
        "engine-0": [],
        "engine-1": ["request_kwargs"],
    }
    assert examined_lines[0].versions == {"aot_vllm": "0.2.0", "vllm": "0.32.0"}
    assert examined_lines[0].reduction["retention"] == 0.1
    (warning,) = [record for record in caplog.records if hasattr(record, "check")]
    assert "--trust-request-mm-kwargs" in warning.getMessage()


async def test_an_engine_is_examined_again_when_it_comes_back_and_when_it_changes(caplog):
    caplog.set_level("INFO", logger="server")

    def lines():
        return [record.failed_checks for record in caplog.records if record.getMessage() == "engine examined"]

    async with (
        EngineDouble(profile=ONEVISION).serving() as engine,
        gateway(engine, engine_health_seconds=0.05) as client,
    ):
        await asyncio.sleep(0.3)
        assert lines() == [[]]  # once, not at every check
        engine.healthy = False
        await until(lambda: value(client, "engine_up", engine="engine-0") == 0)
        engine.healthy = True
        await until(lambda: len(lines()) == 2)
        engine.profile = {**ONEVISION, "prompt_tokens_details": False}
        await until(lambda: len(lines()) == 3)
        assert lines()[2] == ["prompt_details"]
        engine.profile = None
        await until(lambda: len(lines()) == 4)
        assert lines()[3] == ["plugin"]
        assert value(client, "engine_check", engine="engine-0", check="prompt_details") is None  # nobody knows


async def test_an_engine_that_refuses_the_gateways_key_is_down_and_says_why(engine, caplog):
    async with gateway(engine, engine_health_seconds=0.05) as client:
        assert value(client, "engine_check", engine="engine-0", check="key") == 1
        engine.listing_status = 401
        await until(lambda: value(client, "engine_up", engine="engine-0") == 0)
        assert value(client, "engine_check", engine="engine-0", check="key") == 0
        assert value(client, "engine_check", engine="engine-0", check="models") is None
        ready = await client.get("/health/ready")
        assert (ready.status_code, state_of(ready)) == (503, {"engine-0": (False, ["key"])})
        engine.listing_status = 200
        await until(lambda: value(client, "engine_up", engine="engine-0") == 1)
        assert value(client, "engine_check", engine="engine-0", check="key") == 1
    assert sum("refuses the gateway's API key" in record.getMessage() for record in caplog.records) == 1


async def test_an_engine_that_does_not_list_its_models_is_down(engine):
    engine.listing_status = 500
    async with gateway(engine) as client:
        assert value(client, "engine_up", engine="engine-0") == 0


def configured(tmp_path, **aliases):
    config = tmp_path / "gateway.yaml"
    config.write_text(json.dumps({"models": {name: {"engine_model": model} for name, model in aliases.items()}}))
    return config


async def test_an_alias_that_no_engine_serves_is_not_listed_and_its_requests_are_the_operators_fault(
    engine, tmp_path, caplog
):
    async with gateway(engine, config=configured(tmp_path, here="llava", gone="qwen")) as client:
        assert [card["id"] for card in (await client.get("/v1/models")).json()["data"]] == ["here"]
        for answer in (await client.post(CHAT, json=ask(model="gone")), await client.get("/v1/models/gone")):
            assert (answer.status_code, error_of(answer)["code"]) == (503, "model_not_served")
        assert value(client, "rejections_total", reason="misconfigured") == 2
        assert (await client.post(CHAT, json=ask(model="other"))).status_code == 404
        assert (await client.post(CHAT, json=ask(model="here"))).status_code == 200
        assert value(client, "engine_check", engine="engine-0", check="models") == 1
    (warning,) = [record for record in caplog.records if "no engine serves" in record.getMessage()]
    assert warning.engine_models == ["qwen"]


async def test_an_engine_that_serves_none_of_the_aliases_fails_a_check(engine, tmp_path):
    async with gateway(engine, config=configured(tmp_path, gone="qwen")) as client:
        assert value(client, "engine_check", engine="engine-0", check="models") == 0
        assert (await client.get("/v1/models")).json()["data"] == []


async def test_an_alias_may_belong_to_an_engine_that_has_not_been_seen_yet(engine, tmp_path, caplog):
    config = configured(tmp_path, here="llava", there="qwen")
    async with gateway(engines=(engine.url, "http://127.0.0.1:1"), config=config) as client:
        answer = await client.post(CHAT, json=ask(model="there"))
        assert (answer.status_code, error_of(answer)["code"]) == (503, "engine_unavailable")
        assert answer.headers["retry-after"]
        assert (await client.post(CHAT, json=ask(model="other"))).status_code == 404
    assert not [record for record in caplog.records if "no engine serves" in record.getMessage()]


async def test_models_tell_what_engines_keep_by_default(engine):
    engine.profile = ONEVISION
    async with gateway(engine) as client:
        (card,) = (await client.get("/v1/models")).json()["data"]
        assert card["aot"]["engine_retention"] == 0.1


async def test_models_tell_the_preset_of_their_alias_or_else_of_the_engine(engine, tmp_path):
    engine.profile = {**ONEVISION, **ALLOWING}
    path = tmp_path / "gateway.yaml"
    path.write_text("models: {own: {engine_model: llava}, published: {engine_model: llava, preset: paper}}")
    async with gateway(engine, config=path) as client:
        cards = (await client.get("/v1/models")).json()["data"]
        assert {card["id"]: card["aot"]["preset"] for card in cards} == {"own": "diverse", "published": "paper"}


async def test_an_alias_sends_its_preset_with_videos_and_only_with_them(engine, tmp_path):
    engine.profile = {**ONEVISION, **ALLOWING}
    path = tmp_path / "gateway.yaml"
    path.write_text(
        "models: {own: {engine_model: llava}, published: {engine_model: llava, preset: paper}, "
        "both: {engine_model: llava, preset: paper, retention: 0.25}}"
    )
    asked = [
        (ask_about(VIDEO, model="own"), None),
        (ask_about(VIDEO, model="own", aot={"retention": 0.5}), {"aot_retention": 0.5}),
        (ask_about(VIDEO, model="published"), {"aot_preset": "paper"}),
        (ask_about(VIDEO, model="published", aot={"retention": 0.5}), {"aot_retention": 0.5, "aot_preset": "paper"}),
        (ask_about(VIDEO, model="both"), {"aot_retention": 0.25, "aot_preset": "paper"}),
        (ask(model="both"), None),
    ]
    async with gateway(engine, config=path) as client:
        for body, _ in asked:
            assert (await client.post(CHAT, json=body)).status_code == 200
        refused = await client.post(CHAT, json=ask_about(VIDEO, model="own", aot={"preset": "paper"}))
        assert (refused.status_code, error_of(refused)["param"]) == (400, "aot.preset")
        forbidden = await client.post(CHAT, json=ask_about(VIDEO, model="own", mm_processor_kwargs={"aot_preset": "x"}))
        assert (forbidden.status_code, error_of(forbidden)["code"]) == (400, "forbidden_field")
    assert [request.get("mm_processor_kwargs") for request in engine.requests] == [sent for _, sent in asked]


REFUSED_PRESET = (
    b'{"error":{"message":"aot_preset must be one of the presets that this engine allows, diverse, got \'paper\'; '
    b'its operator lists them under allowed_presets in the aot settings","type":"BadRequestError","code":400}}'
)


async def test_an_engine_that_refuses_an_aliass_preset_is_the_operators_fault(engine, tmp_path, caplog):
    engine.profile = {**ONEVISION, "reduction": {"active": True, "preset": "diverse", "presets": ["diverse"]}}
    engine.error = (400, REFUSED_PRESET, "application/json")
    path = tmp_path / "gateway.yaml"
    path.write_text("models: {published: {engine_model: llava, preset: paper}}")
    async with gateway(engine, config=path) as client:
        assert state_of(await client.get("/health/ready"))["engine-0"] == (True, ["presets"])
        answer = await client.post(CHAT, json=ask_about(VIDEO, model="published"))
        assert (answer.status_code, error_of(answer)["code"]) == (500, "engine_misconfigured")
        assert "preset" not in answer.text
    (line,) = [record for record in caplog.records if record.getMessage() == "engine is not set up for the gateway"]
    assert "diverse, got 'paper'" in line.engine_message


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_without_trust_is_the_operators_fault_and_the_log_has_its_words(engine, caplog, stream):
    engine.error = (400, UNTRUSTED, "application/json")
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask_about(VIDEO, aot={"retention": 0.2}, stream=stream))
        assert (answer.status_code, error_of(answer)["code"]) == (500, "engine_misconfigured")
        assert answer.headers["x-should-retry"] == "false"
        assert "mm_processor_kwargs" not in answer.text
        assert value(client, "rejections_total", reason="misconfigured") == 1
        assert value(client, "rejections_total", reason="engine_refused") == 0
    (line,) = [record for record in caplog.records if record.getMessage() == "engine is not set up for the gateway"]
    assert "Start the server with --trust-request-mm-kwargs" in line.engine_message
    assert (line.levelname, line.engine) == ("ERROR", "engine-0")


@pytest.mark.parametrize("status", [401, 403])
async def test_requests_that_an_engine_refuses_for_the_key_are_served_by_another(status):
    async with (
        EngineDouble(error=(status, b'{"error":"Unauthorized"}', "application/json")).serving() as closed,
        EngineDouble().serving() as open_,
        gateway(engines=(closed.url, open_.url)) as client,
    ):
        for _ in range(4):
            assert (await client.post(CHAT, json=ask())).status_code == 200
        assert value(client, "upstream_retries_total", reason="misconfigured") == len(closed.requests) >= 2
        assert value(client, "engine_breaker_open", engine="engine-0") == 0
