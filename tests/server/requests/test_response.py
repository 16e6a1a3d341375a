"""`/v1/responses` takes videos as chats do."""

import json

import pytest

from tests.server.clips import clip, data_url, picture
from tests.server.engine_double import RESPONSE, RESPONSE_STREAM, response_event
from tests.server.engines.profiles import ONEVISION
from tests.server.harness import error_of, gateway, value
from tests.server.media.hosts import PUBLIC, Internet, MediaHost

RESPONSES = "/v1/responses"
VIDEO = data_url(clip())
IMAGE = data_url(picture(), "image/png")
TEXT = {"type": "input_text", "text": "What happens?"}
SAVED = {"before": 6272, "after": 627, "retention": 0.1}


def about(*parts, **fields):
    return {"model": "llava", "input": [{"role": "user", "content": [*parts, TEXT]}], **fields}


@pytest.fixture
async def host():
    async with MediaHost().serving() as host:
        yield host


@pytest.fixture
def files_dir(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_video", "video_url": VIDEO},
        {"type": "input_video", "video_url": {"url": VIDEO}},
        {"type": "video_url", "video_url": {"url": VIDEO}},
        {"video_url": VIDEO, "image_pil": "x", "tool_reference": "y"},
        {"type": "input_file", "file_data": VIDEO, "filename": "a.mp4"},
        {"type": "input_file", "file_data": VIDEO.partition(",")[2]},
        {"type": "input_video", "video_url": "http://media.example/clip.mp4"},
        {"type": "input_file", "file_url": "http://media.example/clip.mp4"},
        {"type": "input_file", "file_id": "the uploaded one"},
    ],
)
async def test_a_video_comes_in_every_form_and_goes_on_in_the_one_that_engines_read(engine, host, files_dir, part):
    internet = Internet()
    internet.route(PUBLIC, 80, host)
    async with gateway(engine, network=internet.network, media_allow_http=True, files_dir=files_dir) as client:
        if "file_id" in part:
            answer = await client.post("/v1/files", files={"file": ("a.mp4", clip())}, data={"purpose": "user_data"})
            part = {**part, "file_id": answer.json()["id"]}
        answer = await client.post(RESPONSES, json=about(part, aot={"retention": 0.2}))
        assert answer.status_code == 200, answer.text
        assert value(client, "video_duration_seconds_count") == 1
    assert answer.json()["usage"]["video_tokens"] == SAVED
    assert answer.headers["x-aot-video-tokens-after"] == "627"
    (sent,) = engine.requests
    video, text = sent["input"][0]["content"]
    assert video.pop("uuid")
    assert (video, text) == ({"type": "input_file", "video_url": VIDEO}, TEXT)
    assert sent["mm_processor_kwargs"] == {"aot_retention": 0.2}
    assert "aot" not in sent


async def test_a_video_has_the_name_that_it_has_in_chats(engine):
    async with gateway(engine) as client:
        await client.post(RESPONSES, json=about({"type": "input_video", "video_url": VIDEO}))
        chat = [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": VIDEO}}]}]
        await client.post("/v1/chat/completions", json={"model": "llava", "messages": chat})
    response, chat = engine.requests
    assert response["input"][0]["content"][0]["uuid"] == chat["messages"][0]["content"][0]["uuid"]


async def test_frames_and_a_bound_on_tokens_are_asked_for_as_in_chats(engine):
    engine.profile = ONEVISION
    async with gateway(engine) as client:
        answer = await client.post(
            RESPONSES, json=about({"type": "input_video", "video_url": VIDEO}, aot={"frames": 4, "tokens": 100})
        )
        assert answer.status_code == 200, answer.text
        error = error_of(await client.post(RESPONSES, json=about(aot={"retention": 2})))
    assert error["param"] == "aot.retention"
    (sent,) = engine.requests
    assert sent["input"][0]["content"][0]["video_url"].startswith("data:video/x-aot-frames;base64,")
    assert sent["mm_processor_kwargs"] == {"aot_retention": 0.12}  # 4 frames of 196 tokens, and one: 95


async def test_videos_and_images_are_taken_in_together_and_in_their_order(engine):
    image = {"type": "input_image", "image_url": IMAGE, "detail": "auto"}
    async with gateway(engine) as client:
        parts = [{"type": "input_video", "video_url": VIDEO}, image, {"type": "input_video", "video_url": "file:///a"}]
        error = error_of(await client.post(RESPONSES, json=about(*parts)))
        assert (error["param"], error["code"]) == ("input[0].content[2].video_url", "invalid_media_url")
        assert (await client.post(RESPONSES, json=about(*parts[:2]))).status_code == 200
    assert engine.requests[0]["input"][0]["content"][1] == image


async def test_a_stream_has_the_savings_in_the_response_that_closes_it(engine):
    usage = {
        "input_tokens": 640,
        "input_tokens_details": {"cached_tokens": 624},
        "output_tokens": 2,
        "total_tokens": 642,
    }
    closing = response_event("response.completed", response={**RESPONSE, "usage": usage}, sequence_number=3)
    engine.response_pieces = [*RESPONSE_STREAM[:-1], closing]
    async with gateway(engine) as client:
        answer = await client.post(RESPONSES, json=about({"type": "input_video", "video_url": VIDEO}, stream=True))
        assert value(client, "video_tokens_total", model="llava", stage="after") == 627
    assert answer.headers["x-aot-video-tokens-before"] == "6272"
    assert answer.content.startswith(b"".join(RESPONSE_STREAM[:-1]))
    last = json.loads(answer.content.rpartition(b"data: ")[2])
    assert last["response"] == {**RESPONSE, "usage": {**usage, "video_tokens": {**SAVED, "cached": 611}}}


async def test_without_videos_nothing_is_added(engine):
    async with gateway(engine) as client:
        answer = await client.post(RESPONSES, json=about(aot={"retention": 0.2}))
    assert answer.content == json.dumps(RESPONSE).encode()
    assert engine.requests == [about(store=False)]


@pytest.mark.parametrize(
    ("part", "param", "code"),
    [
        ({"type": "input_video", "video_url": VIDEO, "uuid": "u"}, "uuid", "forbidden_field"),
        ({"type": "input_video", "video_url": {"url": VIDEO, "uuid": "u"}}, "uuid", "forbidden_field"),
        ({"video_url": VIDEO, "image_embeds": "x"}, "image_embeds", "forbidden_field"),
        ({"type": "input_video", "video_url": VIDEO, "fps": 2}, "fps", "misplaced_field"),
        ({"type": "input_video", "video_url": {"url": VIDEO, "detail": "low"}}, "video_url.detail", "misplaced_field"),
        ({"type": "input_file", "file_data": VIDEO, "file_id": "file-1"}, None, None),
        ({"type": "input_video", "video_url": VIDEO, "image_url": IMAGE}, None, None),
        ({"type": "input_video", "video_url": 7}, "video_url", None),
        ({"type": "input_video", "video_url": {"url": None}}, "video_url.url", None),
        ({"type": "input_video", "video_url": "http://127.0.0.1/a.mp4"}, "video_url", "media_host_not_allowed"),
        ({"type": "input_file", "file_url": "http://169.254.169.254/"}, "file_url", "media_host_not_allowed"),
        ({"type": "input_file", "file_data": data_url(b"%PDF-1.7", "application/pdf")}, "file_data", "invalid_media"),
        ({"type": "input_file", "file_id": "file-1"}, "file_id", None),
    ],
)
async def test_what_chats_refuse_is_refused_here_too(engine, part, param, code):
    async with gateway(engine, media_allow_http=True) as client:
        answer = await client.post(RESPONSES, json=about(part))
    assert answer.status_code == 400, answer.text
    where = "input[0].content[0]"
    assert (error_of(answer)["param"], error_of(answer)["code"]) == (f"{where}.{param}" if param else where, code)
    assert engine.requests == []


async def test_a_prompt_too_long_by_its_videos_is_told_what_would_fit(engine):
    message = "The decoder prompt (length 336) is longer than the maximum model length of 300."
    engine.profile = ONEVISION
    engine.error = (400, json.dumps({"error": {"message": message, "code": 400}}).encode(), "application/json")
    async with gateway(engine) as client:
        answer = await client.post(RESPONSES, json=about({"type": "input_video", "video_url": VIDEO}))
    assert "it would fit with aot.retention 0.08 at most, or with aot.tokens 199 at most" in error_of(answer)["message"]


async def test_the_preset_of_an_alias_goes_with_its_videos(engine, tmp_path):
    path = tmp_path / "gateway.yaml"
    path.write_text("models: {published: {engine_model: llava, preset: paper}}")
    async with gateway(engine, config=path) as client:
        answer = await client.post(
            RESPONSES,
            json=about({"type": "input_video", "video_url": VIDEO}, model="published", aot={"retention": 0.2}),
        )
    assert answer.status_code == 200
    assert engine.requests[0]["mm_processor_kwargs"] == {"aot_retention": 0.2, "aot_preset": "paper"}
