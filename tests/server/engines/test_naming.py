"""Clients get the name of the model that they asked for."""

import json

import pytest

from server.engines.naming import renamed
from server.engines.savings import Savings
from server.engines.streams import ChatStream
from tests.server.clips import clip, data_url
from tests.server.engine_double import COMPLETION, DONE, ROLE, TEXT, USAGE, chunk, delta
from tests.server.harness import CHAT, ask, ask_about, gateway

STREAM = [ROLE, *TEXT, USAGE, DONE]
ASKED = {"stream": True, "stream_options": {"include_usage": True}}
AS_NAMED = b"".join(STREAM).replace(b'"model":"llava"', '"model":"schön"'.encode())


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"id":"a","model":"x","choices":[]}', b'{"id":"a","model":"fast","choices":[]}'),
        (
            b'{"id": "a", "model": "x", "n": 0.30000001192092896}',
            b'{"id": "a", "model": "fast", "n": 0.30000001192092896}',
        ),
        (b'{"model":"a\\"b"}', b'{"model":"fast"}'),
        (b'{"choices":[{"model":"x"}],"model":"y"}', b'{"choices":[{"model":"x"}],"model":"fast"}'),
        (b'{"metadata":{"model":"x"},"model":"y"}', b'{"metadata":{"model":"x"},"model":"fast"}'),
        (b'{"text":"\\"model\\":\\"x\\"","model":"y"}', b'{"text":"\\"model\\":\\"x\\"","model":"fast"}'),
        (b'{"text":"' + b"x" * 5000 + b'","model":"y"}', b'{"text":"' + b"x" * 5000 + b'","model":"fast"}'),
        (b'{"choices":[{"model":"x"}]}', b'{"choices":[{"model":"x"}]}'),
        (b'["model"]', b'["model"]'),
        (b"no JSON", b"no JSON"),
        (b"", b""),
    ],
)
def test_of_a_whole_answer_the_models_name_alone_changes(body, expected):
    assert renamed(body, "fast") == expected


@pytest.mark.parametrize("step", [1, 7, 10_000])
def test_every_chunk_of_a_stream_carries_the_name_whatever_the_pieces(step):
    stream, whole = ChatStream(savings=None, usage_wanted=True, model="schön"), b"".join(STREAM)
    assert b"".join(stream.feed(whole[at : at + step]) for at in range(0, len(whole), step)) == AS_NAMED
    assert stream.done


def test_text_that_looks_like_a_name_stays():
    tricky = delta('{"model":"llava"} "model":"llava"')
    stream = ChatStream(savings=None, usage_wanted=True, model="fast")
    passed = stream.feed(ROLE + tricky + DONE)
    assert json.loads(passed.split(b"\n\n")[1][6:])["choices"] == json.loads(tricky[6:])["choices"]
    assert passed.count(b'"model":"fast"') == 2


def test_an_error_before_the_first_chunk_is_none_the_worse():
    stream = ChatStream(savings=None, usage_wanted=True, model="fast")
    stream.feed(b'data: {"error":{"message":"no","code":400}}\n\n')
    assert stream.failure is not None


async def test_an_alias_is_the_model_of_all_answers_about_it(engine, tmp_path):
    config = tmp_path / "gateway.yaml"
    config.write_text("models: {schön: {engine_model: llava}, llava: {engine_model: llava}}", encoding="utf-8")
    video = data_url(clip())
    async with gateway(engine, config=config) as client:
        for headers in (engine.headers, {}):
            engine.headers = headers
            for request in (ask(), ask_about(video)):
                whole = await client.post(CHAT, json={**request, "model": "schön"})
                assert whole.json()["model"] == "schön"
                assert whole.json()["choices"] == COMPLETION["choices"]
                streamed = await client.post(CHAT, json={**request, **ASKED, "model": "schön"})
                chunks = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
                assert [chunk["model"] for chunk in chunks] == ["schön"] * (len(STREAM) - 1)
        assert (await client.post(CHAT, json=ask())).content == engine.completion  # asked by the engine's own name


async def test_an_engine_that_answers_by_another_of_its_names_is_renamed_too(engine):
    engine.models = ["llava", "also-llava"]
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask(model="also-llava"))
    assert answer.json()["model"] == "also-llava"


@pytest.mark.parametrize(
    ("usage", "cached"),
    [
        ({"prompt_tokens": 700, "prompt_tokens_details": {"cached_tokens": 690}}, 617),  # 627 of 700 are videos'
        ({"prompt_tokens": 700, "prompt_tokens_details": {"cached_tokens": 700}}, 627),
        ({"prompt_tokens": 700, "prompt_tokens_details": {"cached_tokens": 73}}, None),
        ({"prompt_tokens": 700, "prompt_tokens_details": {"cached_tokens": 0}}, None),
        ({"input_tokens": 700, "input_tokens_details": {"cached_tokens": 690}}, 617),
        ({"prompt_tokens": 700, "prompt_tokens_details": None}, None),
        ({"prompt_tokens": 700, "prompt_tokens_details": {"cached_tokens": None}}, None),
        ({"prompt_tokens": "x", "prompt_tokens_details": {"cached_tokens": True}}, None),
        ({}, None),
    ],
)
def test_of_the_cached_tokens_those_are_videos_that_no_text_can_be(usage, cached):
    assert Savings(6272, 627, 0.1).as_usage(usage).get("cached") == cached


async def test_a_video_in_the_engines_cache_is_told_in_answers_and_streams(engine):
    usage = {
        "prompt_tokens": 640,
        "total_tokens": 652,
        "completion_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 624, "multimodal_tokens": {"video": 627}},
    }
    engine.completion = json.dumps({**COMPLETION, "usage": usage}).encode()
    engine.pieces = [ROLE, *TEXT, chunk(choices=[], usage=usage), DONE]
    told = {"before": 6272, "after": 627, "retention": 0.1, "cached": 611}
    async with gateway(engine) as client:
        whole = await client.post(CHAT, json=ask_about(data_url(clip())))
        assert whole.json()["usage"] == {**usage, "video_tokens": told}
        streamed = await client.post(CHAT, json=ask_about(data_url(clip()), **ASKED))
        last = [line for line in streamed.text.splitlines() if line.startswith("data: {")][-1]
        assert json.loads(last[6:])["usage"] == {**usage, "video_tokens": told}
