"""A request with media that an engine answers with 500, before it has generated anything, is sent to it once more."""

import pytest

from tests.server.clips import clip, data_url
from tests.server.engine_double import DONE, ROLE, TEXT, EngineDouble
from tests.server.harness import CHAT, ask, ask_about, error_of, gateway, value

VIDEO = data_url(clip())
IMAGE_URL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII="
)
MISS = b'data: {"error": {"message": "Internal server error", "code": 500}}\n\n'
REFUSAL = b'data: {"error": {"message": "min_tokens must be less", "code": 400}}\n\n'


def failing(times, status=500):
    return {"error": (status, b'{"error":{"message":"Internal server error","code":500}}', "application/json")} | {
        "errors_left": times
    }


def retries(client):
    return value(client, "upstream_retries_total", reason="cache_miss")


@pytest.mark.parametrize("stream", [False, True])
async def test_one_500_to_a_chat_with_media_is_not_seen(stream):
    async with (
        EngineDouble(**failing(1)).serving() as first,
        EngineDouble(**failing(1)).serving() as second,
        gateway(engines=(first.url, second.url)) as client,
    ):
        answer = await client.post(CHAT, json=ask_about(VIDEO, stream=stream))
        assert answer.status_code == 200
        assert "x-should-retry" not in answer.headers
        assert retries(client) == 1
        assert value(client, "engine_breaker_open", engine="engine-0") == 0
    assert sorted((len(first.requests), len(second.requests))) == [0, 2]
    (sent, again) = first.requests or second.requests
    assert sent == again


async def test_one_error_at_the_begin_of_a_stream_is_not_seen(engine):
    engine.first_pieces = [ROLE, MISS, DONE]
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask_about(VIDEO, stream=True))
        assert retries(client) == 1
    assert answer.content == b"".join([ROLE, *TEXT, DONE])
    assert answer.headers["x-aot-video-tokens-before"] == "6272"


async def test_an_image_is_a_medium_too(engine):
    engine.error, engine.errors_left = failing(1).values()
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": IMAGE_URL}}]}]
    async with gateway(engine) as client:
        assert (await client.post(CHAT, json=ask(messages=messages))).status_code == 200
        assert retries(client) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_second_500_is_told(engine, stream):
    engine.error, engine.errors_left = failing(None).values()
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask_about(VIDEO, stream=stream))
        assert answer.status_code == 502
        assert error_of(answer)["code"] == "engine_failed"
        assert retries(client) == 1
    assert len(engine.requests) == 2


@pytest.mark.parametrize(("status", "seen"), [(400, 400), (429, 429), (501, 502), (502, 502), (503, 503), (504, 504)])
async def test_no_other_status_is_asked_for_again(engine, status, seen):
    engine.error, engine.errors_left = failing(1, status).values()
    async with gateway(engine) as client:
        assert (await client.post(CHAT, json=ask_about(VIDEO))).status_code == seen
        assert retries(client) == 0
    assert len(engine.requests) == 1


async def test_a_500_to_text_is_not_asked_for_again(engine):
    engine.error, engine.errors_left = failing(1).values()
    async with gateway(engine) as client:
        assert (await client.post(CHAT, json=ask())).status_code == 502
        assert retries(client) == 0
    assert len(engine.requests) == 1


async def test_a_stream_is_not_asked_for_again_once_something_was_generated(engine):
    engine.first_pieces = [ROLE, TEXT[0], MISS, DONE]
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask_about(VIDEO, stream=True))
        assert answer.content.startswith(ROLE + TEXT[0] + b'data: {"error":')
        assert retries(client) == 0
    assert len(engine.requests) == 1


async def test_an_engine_that_dies_of_the_first_time_is_not_followed_by_another():
    async with (
        EngineDouble(**failing(1), dies_after=0).serving() as first,
        EngineDouble(**failing(1), dies_after=0).serving() as second,
        gateway(engines=(first.url, second.url)) as client,
    ):
        answer = await client.post(CHAT, json=ask_about(VIDEO))
        assert answer.status_code == 502
    assert sorted((len(first.requests), len(second.requests))) == [0, 2]


async def test_a_refusal_at_the_begin_of_a_stream_has_its_status(engine):
    engine.first_pieces = [REFUSAL, DONE]
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask_about(VIDEO, stream=True))
        assert answer.status_code == 400
        assert "min_tokens" in error_of(answer)["message"]
        assert retries(client) == 0
