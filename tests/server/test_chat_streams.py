import asyncio
import json

import pytest

from tests.server.clips import clip, data_url
from tests.server.engine_double import DONE, ROLE, TEXT, USAGE, chunk
from tests.server.harness import CHAT, ask, ask_about, error_of, gateway, value

VIDEO = data_url(clip())


async def test_a_stream_is_the_engines_with_the_usage_chunk_hidden(engine):
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask_about(VIDEO, stream=True))
    assert answer.content == b"".join([ROLE, *TEXT, DONE])
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["x-aot-video-tokens-before"] == "6272"
    assert engine.requests[0]["stream_options"] == {"include_usage": True}


async def test_a_stream_with_usage_has_the_savings_in_its_usage_chunk(engine):
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask_about(VIDEO, stream=True, stream_options={"include_usage": True}))
    start = b"".join([ROLE, *TEXT])
    assert answer.content.startswith(start)
    usage = json.loads(answer.content.removeprefix(start).removesuffix(DONE).removeprefix(b"data: "))["usage"]
    assert usage["video_tokens"] == {"before": 6272, "after": 627, "retention": 0.1}
    assert usage["prompt_tokens"] == 640


async def test_a_stream_about_text_is_the_engines_byte_for_byte(engine):
    engine.headers = {}
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask(stream=True, stream_options={"include_usage": True}))
    assert answer.content == b"".join(engine.pieces)


@pytest.mark.parametrize("dies_after", [0, 1, 3])
async def test_a_stream_that_breaks_ends_with_an_error_and_without_done(engine, dies_after):
    engine.dies_after = dies_after
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask(stream=True))
        assert answer.content.startswith(b"".join(engine.pieces[:dies_after]))
        error = json.loads(answer.content.removeprefix(b"".join(engine.pieces[:dies_after])).removeprefix(b"data: "))
        assert error["error"]["type"] == "server_error"
        assert error["error"]["code"] == "engine_failed"
        assert b"[DONE]" not in answer.content
        assert b"127.0.0.1" not in answer.content
        labels = {"route": CHAT, "model": "llava", "status_class": "5xx", "stream": "true"}
        assert value(client, "requests_total", **labels) == 1
        assert value(client, "rejections_total", reason="engine_failed") == 1


async def test_a_stream_that_ends_early_but_politely_is_a_failure_too(engine):
    engine.pieces = [ROLE, *TEXT]
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask(stream=True))
    assert answer.content.startswith(b"".join([ROLE, *TEXT]) + b'data: {"error":')


async def test_an_engine_silent_in_a_stream_times_out(engine):
    engine.hold = asyncio.Event()
    async with gateway(engine, engine_read_seconds=0.3) as client:
        answer = await client.post(CHAT, json=ask(stream=True))
    assert b'"code":"engine_timeout"' in answer.content
    await asyncio.wait_for(engine.aborted.wait(), 5)


async def test_an_engine_that_answers_a_stream_with_json_has_failed(engine):
    engine.error = (200, b"{}", "application/json")
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask(stream=True))
    assert answer.status_code == 502
    assert error_of(answer)["code"] == "engine_failed"


async def test_several_usage_like_chunks_in_one_read_are_told_apart(engine):
    engine.pieces = [ROLE + TEXT[0] + chunk(choices=[], usage={"prompt_tokens": 1}) + DONE]
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask(stream=True))
    assert answer.content == ROLE + TEXT[0] + DONE
    assert USAGE not in answer.content
