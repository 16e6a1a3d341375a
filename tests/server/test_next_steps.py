"""An error says what its reader can do next."""

import json

import pytest

from server.errors import ContextExceeded, engine_error
from server.keys import digest_of, new_key
from server.requests.parameters import OPERATOR_FIELDS
from tests.server.clips import clip, data_url, picture
from tests.server.engines.profiles import ONEVISION
from tests.server.harness import CHAT, ask, ask_about, error_of, gateway

VIDEO = data_url(clip())
FRAMES, PER_FRAME = 12, 196
TEXT_TOKENS = 100
TOO_LONG = (
    "The decoder prompt (length {}) is longer than the maximum model length of {}. Make sure that `max_model_len` is "
    "no smaller than the number of text tokens plus multimodal tokens."
)


def after(retention):
    """The tokens of the clip, whose engine counts 196 a frame and one for the video."""
    return max(FRAMES, round(retention * FRAMES * PER_FRAME)) + 1


def too_long(prompt, context, message=TOO_LONG):
    body = {
        "error": {"message": message.format(prompt, context), "type": "BadRequestError", "param": None, "code": 400}
    }
    return (400, json.dumps(body).encode(), "application/json")


async def told(client, request, path=CHAT):
    answer = await client.post(path, json=request)
    assert answer.status_code == 400, answer.text
    return error_of(answer)


@pytest.mark.parametrize(
    ("fields", "retention", "fits"),
    [
        ({}, 0.1, 0.07),
        ({"aot": {"retention": 0.5}}, 0.5, 0.07),
        ({"aot": {"tokens": 300}}, 0.12, 0.07),
        ({"max_tokens": 50}, 0.1, 0.05),
        ({"max_tokens": 9000}, 0.1, 0.07),  # no retention leaves that much room
    ],
)
async def test_of_a_prompt_too_long_by_its_videos_it_is_told_what_would_fit(engine, fields, retention, fits):
    context = TEXT_TOKENS + after(0.07) + 7
    prompt = TEXT_TOKENS + after(retention)
    engine.profile, engine.error = ONEVISION, too_long(prompt, context)
    room = context - TEXT_TOKENS - (50 if fields.get("max_tokens") == 50 else 1)
    async with gateway(engine) as client:
        for stream in (False, True):
            error = await told(client, ask_about(VIDEO, stream=stream, **fields))
            assert error["code"] == "context_length_exceeded"
            assert error["message"] == (
                f"This model's maximum context length is {context} tokens, and the prompt has {prompt}, "
                f"{after(retention)} of them of videos: it would fit with aot.retention {fits:g} at most, "
                f"or with aot.tokens {room} at most"
            )
        engine.error = None
        for aot in ({"retention": fits}, {"tokens": room}):  # both are taken, and come to the same
            assert (await client.post(CHAT, json=ask_about(VIDEO, aot=aot))).status_code == 200
            assert engine.requests[-1]["mm_processor_kwargs"] == {"aot_retention": fits}
    assert after(fits) <= room < after(fits + 0.01)


@pytest.mark.parametrize(
    ("profile", "prompt", "context", "words"),
    [
        (ONEVISION, TEXT_TOKENS + after(0.1), TEXT_TOKENS + 10, "even with aot.retention 0.01 they would have 25"),
        (ONEVISION, TEXT_TOKENS + after(0.1), TEXT_TOKENS - 10, "the text alone is too long"),
        ({**ONEVISION, "reduction": {"active": False}}, 3000, 2000, "ask for fewer aot.frames"),
        (None, 3000, 2000, "ask for a smaller aot.retention, or send fewer or shorter videos"),
    ],
)
async def test_where_no_retention_would_fit_another_way_is_told(engine, profile, prompt, context, words):
    engine.profile, engine.error = profile, too_long(prompt, context)
    async with gateway(engine) as client:
        error = await told(client, ask_about(VIDEO))
    assert words in error["message"]
    assert "max_model_len" not in error["message"]


async def test_the_bounds_of_an_alias_hold_for_what_is_told(engine, tmp_path):
    config = tmp_path / "gateway.yaml"
    config.write_text("models: {video: {engine_model: llava, retention: 0.3, min_retention: 0.1, max_retention: 0.5}}")
    engine.profile, engine.error = ONEVISION, too_long(TEXT_TOKENS + after(0.3), TEXT_TOKENS + after(0.08))
    async with gateway(engine, config=config) as client:
        error = await told(client, {**ask_about(VIDEO), "model": "video"})
    assert f"even with aot.retention 0.1 they would have {after(0.1)}" in error["message"]


async def test_a_prompt_too_long_by_its_text_is_told_so(engine):
    engine.error = too_long(9000, 8192)
    async with gateway(engine) as client:
        error = await told(client, ask())
    assert error["message"] == (
        "This model's maximum context length is 8192 tokens, and the prompt has 9000: shorten the prompt"
    )


@pytest.mark.parametrize(
    "message",
    [
        TOO_LONG,
        "This model's maximum context length is {1} tokens. However, your prompt contains at least {0} input tokens, "
        "which exceeds this limit even without any output tokens. Please reduce the length of the input prompt.",
        "Input length ({0}) exceeds model's maximum context length ({1}).",
        "This model's maximum context length is {1} tokens. However, you requested {0} tokens (in the messages).",
        "The decoder prompt (length {0}) plus the number of requested output tokens (at least 1) is longer than the "
        "maximum model length of {1}. Make sure that `max_model_len` is no smaller than the number of text tokens.",
    ],
)
def test_engines_words_for_a_prompt_too_long_are_understood(message):
    _, body, _ = too_long(9000, 8192, message)
    error = engine_error(400, body)
    assert isinstance(error, ContextExceeded)
    assert (error.prompt_tokens, error.context_tokens) == (9000, 8192)


async def test_of_an_unknown_model_those_are_told_that_the_key_may_use(engine, tmp_path):
    keys = {name: new_key() for name in ("acme", "globex")}
    tenants = {name: {"keys": [{"sha256": digest_of(key.encode())}]} for name, key in keys.items()}
    tenants["globex"]["models"] = ["fast"]
    models = {name: {"engine_model": "llava"} for name in ("whole", "fast", "secret")}
    config = tmp_path / "gateway.yaml"
    config.write_text(json.dumps({"tenants": tenants, "models": models}))
    async with gateway(engine, config=config) as client:
        for tenant, usable in (("acme", "fast, secret, whole"), ("globex", "fast")):
            client.headers["authorization"] = f"Bearer {keys[tenant]}"
            for answer in (await client.post(CHAT, json=ask(model="gpt-9")), await client.get("/v1/models/gpt-9")):
                assert answer.status_code == 404
                message = error_of(answer)["message"]
                assert message == f"the model 'gpt-9' does not exist; the models that you may use: {usable}"


CONTENTS = {
    b"": "is empty",
    picture(): "is a picture (image/png)",
    b"#EXTM3U\n#EXT-X-VERSION:3\n": "is a playlist",
    b"ffconcat version 1.0\nfile 'a.mp4'": "is a playlist",
    b'<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011">': "is a playlist",
    b"\n<!DOCTYPE html><html><head><title>Sign in</title>": "is a web page",
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>AccessDenied</Code></Error>': "is an XML document",
    b'{"error": "not found"}': "is a JSON document",
    b"\0\0\0\x20ftypheic\0\0\0\0": "is a picture (image/heic)",
    b"%PDF-1.7": "is a PDF document",
    b"PK\x03\x04": "is a ZIP archive",
    b"version https://git-lfs.github.com/spec/v1\n": "is text",
    bytes(range(128, 256)) * 8: "is not a video of a type that this gateway accepts (MP4,",
}


@pytest.mark.parametrize(("content", "words"), CONTENTS.items())
async def test_what_is_sent_instead_of_a_video_is_named(engine, tmp_path, content, words):
    async with gateway(engine, files_dir=tmp_path) as client:
        error = await told(client, ask_about(data_url(content)))
        assert words in error["message"]
        answer = await client.post("/v1/files", files={"file": ("a.mp4", content)}, data={"purpose": "video"})
    assert answer.status_code == 400
    assert error_of(answer)["message"].startswith(f"the file {words}")
    assert error_of(answer)["param"] == "file"
    assert ("send pictures in image_url parts" in error["message"]) == ("picture" in words)
    assert ("send the medium that it names" in error["message"]) == ("playlist" in words)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "is empty"),
        *(
            (path, "is a path")
            for path in ("/home/me/clip.mp4", "./clip.mp4", "clip.mp4", "C:\\clips\\a.mov", "~/a.mkv")
        ),
        ("file:///home/me/clip.mp4", "is a path"),
        (VIDEO.partition(",")[2], "put data:video/<type>;base64, before it"),
        ("/9j/" + "A" * 1000, "put data:video/<type>;base64, before it"),
        ("s3://bucket/clip.mp4", "begins with s3:"),
        ("ftp://example.com/clip.mp4", "begins with ftp:"),
        ("example", "is none"),
        ("data:video/mp4,AAAA", "must begin with data:video/<type>;base64,"),
    ],
)
async def test_of_what_is_no_url_it_is_told_what_to_send(engine, url, words):
    async with gateway(engine) as client:
        error = await told(client, ask_about(url))
    assert error["code"] == "invalid_media_url"
    assert words in error["message"]
    assert "data:video/<type>;base64," in error["message"]
    assert ("/v1/files" in error["message"]) == (words == "is a path")


@pytest.mark.parametrize(
    ("part", "param", "words"),
    [
        ({"type": "video", "video": VIDEO}, "type", '{"type": "video_url", "video_url": {"url": …}}'),
        ({"type": "video_file", "path": "a.mp4"}, "type", '"video_url"'),
        ({"type": "image", "source": {}}, "type", '{"type": "image_url", "image_url": {"url": …}}'),
        ({"type": "audio"}, "type", '"audio_url"'),
        ({"type": "document"}, "type", "must be one of text, video_url, image_url, audio_url, input_audio, file, got"),
        ({"type": 7}, "type", "got '7'"),
        ({"type": "video_url"}, "video_url", "must have the key video_url"),
        ({"type": "input_video", "url": VIDEO}, "video_url", "must have the key video_url"),
        ({"type": "file", "file": None}, "file", "must have the key file"),
        ({"type": "input_image", "file_id": "file-1"}, "image_url", "must have the key image_url"),
    ],
)
async def test_a_part_of_an_unknown_type_gets_the_gateways_own_list(engine, part, param, words):
    async with gateway(engine) as client:
        error = await told(client, ask(messages=[{"role": "user", "content": [part]}]))
    assert error["param"] == f"messages[0].content[0].{param}"
    assert words in error["message"]
    assert engine.requests == []


async def test_a_video_may_be_called_input_video_as_in_responses(engine):
    part = {"type": "input_video", "video_url": VIDEO}
    async with gateway(engine) as client:
        assert (await client.post(CHAT, json=ask(messages=[{"role": "user", "content": [part]}]))).status_code == 200
    assert engine.requests[0]["messages"][0]["content"][0]["video_url"] == {"url": VIDEO}


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", CHAT),
        ("/v1/v1/chat/completions", CHAT),
        ("/v1/v1/v1/chat/completions", CHAT),
        ("/v1/chat/completions/", CHAT),
        ("/models", "/v1/models"),
        ("/v1/metrics", "/metrics"),
        ("/v1/embeddings", "/openapi.json"),
        ("/", "/openapi.json"),
        ("/v1", "/openapi.json"),
        ("/v1/v1", "/openapi.json"),
    ],
)
async def test_an_unknown_path_is_told_where_it_may_lead(engine, path, meant):
    async with gateway(engine) as client:
        answer = await client.post(path, json=ask())
    assert answer.status_code == 404
    assert error_of(answer)["code"] == "not_found"
    assert meant in error_of(answer)["message"]


PYDANTIC = (
    "2 validation errors:\n  {'type': 'float_parsing', 'loc': 'body.temperature', 'msg': 'Input should be a valid "
    "number, unable to parse string as a number', 'input': 'hot'}\n  {'type': 'missing', 'loc': 'body.prompt_embeds', "
    "'msg': 'Field required', 'input': {}}"
)


def refused_by_engine(message, param=None):
    body = {"error": {"message": message, "type": "BadRequestError", "param": param, "code": 400}}
    return engine_error(400, json.dumps(body).encode())


def test_of_pydantics_complaints_the_first_is_told_in_a_sentence():
    error = refused_by_engine(PYDANTIC, "body.temperature")
    assert error.message == "temperature must be a valid number, unable to parse string as a number"
    assert error.param == "temperature"


@pytest.mark.parametrize(
    "text",
    [
        *(f"you may set {name} in its place" for name in ("mm_processor_kwargs", "media_io_kwargs", "prompt_embeds")),
        "Unknown part type; known are text, image_embeds, image_pil",
        "Set `--trust-request-chat-template` to allow it",
        "increase `max_model_len` when starting vLLM",
        "3 validation errors:\n nothing that can be read",
    ],
)
def test_no_text_of_an_engine_names_what_the_gateway_refuses(text):
    assert_tells_nothing(refused_by_engine(text))


def assert_tells_nothing(error):
    """Check that an engine's words are kept back: the client can't help it, or the operator alone can."""
    own = ("the engine refused the request", "the engine does not accept the gateway's requests as it is set up")
    assert error.message.startswith(own)


def test_the_engines_other_texts_are_told():
    assert refused_by_engine("top_p must be in (0, 1], got 2.").message == "top_p must be in (0, 1], got 2."


def test_the_names_of_what_only_the_operator_may_set_are_kept_out_of_engines_texts():
    everyday = {"priority", "request_id", "session_id", "background", "previous_response_id", "previous_input_messages"}
    for name in set(OPERATOR_FIELDS) - everyday:
        assert_tells_nothing(refused_by_engine(f"try {name} instead"))
