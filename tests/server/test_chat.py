import json

import pytest

from tests.server.clips import clip, data_url
from tests.server.engine_double import COMPLETION
from tests.server.harness import CHAT, ask, ask_about, gateway

VIDEO = data_url(clip())


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
    assert engine.requests[0]["messages"][0]["content"][0].pop("uuid")
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
        await client.post(CHAT, json=ask())  # a request without video has nothing to report
        assert len(said()) == 2
    assert said()[0].engine == "engine-0"
