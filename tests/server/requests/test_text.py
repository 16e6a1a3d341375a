"""`/v1/completions` and `/v1/responses` pass through."""

import asyncio
import hashlib
import json

import openai
import pytest

from server.requests.outgoing import isolate
from server.settings import Settings
from tests.server.clips import clip, data_url, picture
from tests.server.engine_double import (
    RESPONSE,
    RESPONSE_STREAM,
    TEXT_COMPLETION,
    TEXT_STREAM,
    TEXT_USAGE,
    response_event,
)
from tests.server.harness import error_of, gateway, served, value

COMPLETIONS, RESPONSES = "/v1/completions", "/v1/responses"
IMAGE = data_url(picture(), "image/png")


def events_of(content: bytes):
    """The events of a stream as a client gets them."""
    return [
        [json.loads(line[6:]) if line[6:7] == b"{" else line for line in event.splitlines()]
        for event in content.split(b"\n\n")
    ]


def named(stream: bytes):
    """The events of an engine's stream as a client gets them who asked for `fast`."""
    return events_of(stream.replace(b'"model": "llava"', b'"model": "fast"'))


def body(path, **fields):
    content = {"prompt": "Say"} if path == COMPLETIONS else {"input": "Say"}
    return {"model": "fast", **content, **fields}


@pytest.fixture
async def client(engine, tmp_path):
    path = tmp_path / "gateway.yaml"
    path.write_text("models: {fast: {engine_model: llava}}")
    async with gateway(engine, config=path, engine_read_seconds=0.5) as client:
        yield client


async def test_the_sdk_gets_completions_and_responses_whole_and_in_streams(engine):
    async with (
        served(Settings(engines=(engine.url,))) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client,
    ):
        assert (await client.completions.create(model="llava", prompt="Say")).choices[0].text == "Hund"
        stream = await client.completions.create(model="llava", prompt="Say", stream=True)
        assert "".join([c.choices[0].text async for c in stream if c.choices]) == "Ein Hund"
        assert (await client.responses.create(model="llava", input="Say")).output_text == "Hund"
        stream = await client.responses.create(model="llava", input="Say", stream=True)
        events = [event async for event in stream]
        assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "Ein Hund"
        assert events[-1].type == "response.completed"
        engine.dies_after = 2
        broken = [
            await client.completions.create(model="llava", prompt="Say", stream=True),
            await client.responses.create(model="llava", input="Say", stream=True),
        ]
        for stream in broken:
            with pytest.raises(openai.APIError, match="broke off"):
                [event async for event in stream]


@pytest.mark.parametrize(
    ("path", "whole", "stream", "added"),
    [
        (COMPLETIONS, TEXT_COMPLETION, TEXT_STREAM, {}),
        (RESPONSES, RESPONSE, RESPONSE_STREAM, {"store": False}),
    ],
)
async def test_answers_and_streams_are_the_engines_but_for_the_models_name(engine, client, path, whole, stream, added):
    wanted = {"stream": True, "stream_options": {"include_usage": True}}
    assert (await client.post(path, json=body(path))).content == json.dumps({**whole, "model": "fast"}).encode()
    assert events_of((await client.post(path, json=body(path, **wanted))).content) == named(b"".join(stream))
    assert engine.requests == [
        {**body(path), "model": "llava", **added},
        {**body(path), "model": "llava", **wanted, **added},
    ]
    labels = {"route": path, "model": "fast", "status_class": "2xx"}
    assert value(client, "requests_total", **labels, stream="false") == 1
    assert value(client, "requests_total", **labels, stream="true") == 1
    assert value(client, "time_to_first_token_seconds_count", model="fast") == 1


@pytest.mark.parametrize(
    ("path", "whole", "stream"), [(COMPLETIONS, TEXT_COMPLETION, TEXT_STREAM), (RESPONSES, RESPONSE, RESPONSE_STREAM)]
)
async def test_asked_by_the_engines_name_answers_and_streams_are_the_engines_byte_for_byte(engine, path, whole, stream):
    wanted = {"model": "llava", "stream": True, "stream_options": {"include_usage": True}}
    async with gateway(engine) as client:
        assert (await client.post(path, json=body(path, model="llava"))).content == json.dumps(whole).encode()
        assert (await client.post(path, json=body(path, **wanted))).content == b"".join(stream)


async def test_a_clients_own_metadata_in_a_response_stays_whatever_its_keys_are(engine, client):
    response = {**RESPONSE, "metadata": {"model": "llava"}}
    engine.response_pieces = [response_event("response.completed", response=response)]
    answer = await client.post(RESPONSES, json=body(RESPONSES, stream=True))
    ((_, event), _) = events_of(answer.content)
    assert (event["response"]["model"], event["response"]["metadata"]) == ("fast", {"model": "llava"})


async def test_a_completions_usage_is_asked_for_in_any_case_and_hidden_from_who_did_not_ask(engine, client):
    answer = await client.post(COMPLETIONS, json=body(COMPLETIONS, stream=True))
    assert events_of(answer.content) == named(b"".join(piece for piece in TEXT_STREAM if piece != TEXT_USAGE))
    assert engine.requests[0]["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize("path", [COMPLETIONS, RESPONSES])
async def test_errors_are_told_in_openais_words(engine, client, path):
    unknown = await client.post(path, json=body(path, model="gpt-9"))
    assert (unknown.status_code, error_of(unknown)["code"]) == (404, "model_not_found")
    engine.error = (400, b'{"error":{"message":"no such thing at http://10.0.0.1/","code":400}}', "application/json")
    refused = await client.post(path, json=body(path))
    assert refused.status_code == 400
    assert error_of(refused)["message"] == "no such thing at [url]"
    for wrong in ({"stream": "yes"}, {"model": 7}, {"prompt": 7, "input": 7}, {"aot": {"retention": 2}}):
        assert (await client.post(path, json=body(path, **wrong))).status_code == 400
    assert len(engine.requests) == 1


@pytest.mark.parametrize(("path", "stream"), [(COMPLETIONS, TEXT_STREAM), (RESPONSES, RESPONSE_STREAM)])
async def test_a_stream_that_breaks_or_falls_silent_ends_with_an_error(engine, client, path, stream):
    engine.dies_after = 1
    broken = await client.post(path, json=body(path, stream=True))
    assert events_of(broken.content)[0] == named(stream[0])[0]
    assert b"[DONE]" not in broken.content
    assert b"response.completed" not in broken.content
    assert json.loads(broken.content.rpartition(b"data: ")[2])["error"]["code"] == "engine_failed"
    engine.dies_after, engine.hold = None, asyncio.Event()
    silent = await client.post(path, json=body(path, stream=True))
    event = silent.content.rpartition(b"data: ")
    assert json.loads(event[2])["error"]["code"] == "engine_timeout"
    assert event[0].endswith(b"event: error\n") == (path == RESPONSES)


async def test_a_failure_told_in_a_responses_stream_is_told_without_its_insides(engine, client):
    failed = response_event("response.failed", response={"error": {"message": "CUDA at /opt/x", "code": "x"}})
    engine.response_pieces = [RESPONSE_STREAM[0], failed]
    answer = await client.post(RESPONSES, json=body(RESPONSES, stream=True))
    assert "CUDA" not in answer.text
    told = json.loads(answer.content.rpartition(b"data: ")[2])
    assert told["type"] == "error"
    assert told["code"] == told["error"]["code"] == "engine_failed"


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (COMPLETIONS, {"prompt_embeds": "AAAA"}),
        (COMPLETIONS, {"kv_transfer_params": {"remote_host": "10.0.0.1"}}),
        (COMPLETIONS, {"prompt": ["a"] * 65}),
        (COMPLETIONS, {"n": 17}),
        (COMPLETIONS, {"chat_template_kwargs": {"x": 1}}),
        (RESPONSES, {"previous_response_id": "resp_1"}),
        (RESPONSES, {"background": True}),
        (RESPONSES, {"tools": [{"type": "mcp", "server_label": "x", "server_url": "http://10.0.0.1"}]}),
        (RESPONSES, {"tools": [{"type": "code_interpreter", "container": {"type": "auto"}}]}),
        (RESPONSES, {"mm_processor_kwargs": {"aot_retention": 1}}),
    ],
)
async def test_what_a_client_may_not_set_is_refused(engine, client, path, fields):
    answer = await client.post(path, json=body(path, **fields))
    assert answer.status_code == 400
    assert error_of(answer)["param"].partition(".")[0].partition("[")[0] == next(iter(fields))
    assert engine.requests == []


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_image", "file_id": "file-1"},
        {"type": "input_image", "image_url": None, "file_id": "file-1"},
        {"type": "input_video", "url": "https://example.com/a.mp4"},
        {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
        {"type": "image_embeds", "image_embeds": "AA=="},
        {"type": "input_image", "image_url": IMAGE, "uuid": "other"},
        {"type": "input_text", "video_url": "https://example.com/a.mp4"},
    ],
)
async def test_media_that_would_reach_the_engine_unfetched_are_told_where_media_go(engine, client, part):
    messages = [{"role": "user", "content": [{"type": "input_text", "text": "Say"}, part]}]
    outputs = [{"type": "function_call_output", "call_id": "c", "output": [part]}]
    for given in (messages, outputs, [part]):
        answer = await client.post(RESPONSES, json=body(RESPONSES, input=given))
        assert answer.status_code == 400
        assert error_of(answer)["param"].startswith("input[0]")
        assert "/v1/chat/completions" in error_of(answer)["message"]
    assert engine.requests == []


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("http://169.254.169.254/latest", "media_host_not_allowed"),
        ("http://example.com/x.png", "media_scheme_not_allowed"),
        ("https://[::ffff:127.0.0.1]/x.png", "media_host_not_allowed"),
        ("https://user@example.com/x.png", "invalid_media_url"),
        ("file:///etc/passwd", "invalid_media_url"),
        ("data:video/mp4;base64,AA==", "invalid_media"),
        ("data:image/png;base64,AAAA", "invalid_media"),
        (data_url(clip(), "image/png"), "invalid_media"),
        (data_url(picture()[:20], "image/png"), "invalid_image"),
        (data_url(picture(9000, 9000), "image/png"), "media_too_large"),
    ],
)
async def test_an_image_in_a_response_is_held_to_what_holds_for_those_of_chats(engine, client, url, code):
    parts = [
        {"type": "input_image", "image_url": url},
        {"image_url": url},
    ]
    for part in parts:
        outputs = [{"type": "function_call_output", "call_id": "c", "output": [part]}]
        for given in ([{"role": "user", "content": [part]}], outputs, [part]):
            answer = await client.post(RESPONSES, json=body(RESPONSES, input=given))
            assert answer.status_code == 400
            assert error_of(answer)["code"] == code
            assert error_of(answer)["param"].startswith("input[0]")
            assert error_of(answer)["param"].endswith("image_url")
    assert engine.requests == []


async def test_the_images_of_responses_are_bounded_in_number_and_together(engine, client):
    image = {"type": "input_image", "image_url": IMAGE}
    for given, says in (
        ([image] * 65, "at most 64 media"),
        ([{"type": "input_image", "image_url": data_url(picture(8000, 8000), "image/png")}] * 6, "when decoded"),
        ([{"type": "input_image", "image_url": {"url": IMAGE}}], "must be a string"),
    ):
        answer = await client.post(RESPONSES, json=body(RESPONSES, input=[{"role": "user", "content": given}]))
        assert answer.status_code == 400
        assert says in error_of(answer)["message"]
    assert engine.requests == []


async def test_images_as_data_urls_and_the_words_of_a_conversation_pass(engine, client):
    given = [
        {"role": "system", "content": "Be brief, see http://example.com."},
        {"role": "user", "content": [{"type": "input_image", "image_url": IMAGE, "detail": "auto"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"url": "http://example.com"}'},
        {"type": "function_call_output", "call_id": "c", "output": "file:///etc"},
    ]
    tools = [{"type": "function", "name": "f", "parameters": {"properties": {"video_url": {"type": "string"}}}}]
    answer = await client.post(RESPONSES, json=body(RESPONSES, input=given, tools=tools, store=True))
    assert answer.status_code == 200
    assert engine.requests == [{"model": "llava", "input": given, "tools": tools, "store": False}]


def test_a_tenants_cache_salt_is_its_own_whatever_it_sends():
    salts = []
    for tenant, asked in (("a", None), ("a", "x"), ("b", None), ("b", "x"), ("", "x")):
        fields = {} if asked is None else {"cache_salt": asked}
        isolate(fields, tenant)
        salts.append(fields["cache_salt"])
    assert len(set(salts)) == 5
    assert salts[-1] == "x"
    assert salts[0] == hashlib.sha256(b"a\0").hexdigest()
    guess = {"cache_salt": salts[0]}
    isolate(guess, "b")
    assert guess["cache_salt"] not in salts
