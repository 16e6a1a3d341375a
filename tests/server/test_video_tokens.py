"""What videos cost is told before an engine is asked to answer."""

import pytest

from tests.server.clips import clip, data_url, picture
from tests.server.engines.profiles import ONEVISION, QWEN
from tests.server.harness import CHAT, ask, ask_about, error_of, gateway, value

TOKENS = "/v1/video/tokens"
URL = data_url(clip(frames=12, fps=6), "video/mp4")
ONE_REDUCED = {**ONEVISION, "reduction": {"active": True, "retention": 0.25}, "context_length": 8192}
QWEN_REDUCED = {**QWEN, "reduction": {"active": True, "retention": 0.25}}


async def test_frames_sizes_and_tokens_are_told_and_nothing_is_generated(engine):
    engine.profile, engine.prompt_tokens = ONE_REDUCED, 17
    async with gateway(engine) as client:
        answer = await client.post(TOKENS, json=ask_about(URL, aot={"retention": 0.1}))
    assert answer.status_code == 200, answer.text
    after = round(0.1 * 12 * 196) + 1
    assert answer.json() == {
        "object": "video.tokens",
        "model": "llava",
        "retention": 0.1,
        "video_tokens": {"before": 12 * 196 + 1, "after": after},
        "prompt_tokens": 17 + after,
        "context_length": 8192,
        "videos": [
            {
                "duration": 2.0,
                "fps": 6.0,
                "source_frames": 12,
                "source_size": {"width": 64, "height": 48},
                "frames": 12,
                "size": {"width": 384, "height": 384},
                "video_tokens": {"before": 12 * 196 + 1, "after": after},
            }
        ],
    }
    (asked,) = engine.requests  # the engine counts the text, and sees no video
    assert asked == {
        "model": "llava",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "What happens?"}]}],
    }


async def test_without_a_retention_the_engines_own_is_counted_with(engine):
    engine.profile = ONE_REDUCED
    async with gateway(engine) as client:
        told = (await client.post(TOKENS, json=ask_about(URL))).json()
        assert (told["retention"], told["video_tokens"]["after"]) == (0.25, 12 * 196 // 4 + 1)
        engine.profile = ONEVISION | {"reduction": {"active": False, "retention": 1.0}}
    async with gateway(engine) as client:  # an engine that reduces nothing keeps all, whatever is asked for
        told = (await client.post(TOKENS, json=ask_about(URL, aot={"retention": 0.1}))).json()
        assert (told["retention"], told["video_tokens"]["after"]) == (1.0, 12 * 196 + 1)


async def test_a_bound_on_tokens_frames_and_a_range_are_counted_as_they_would_be_served(engine):
    engine.profile = ONE_REDUCED
    async with gateway(engine) as client:

        async def told(**aot):
            return (await client.post(TOKENS, json=ask_about(URL, aot=aot))).json()

        assert (await told(tokens=600))["retention"] == 0.25
        assert (await told(frames=4))["video_tokens"]["before"] == 4 * 196 + 1
        in_range = (await told(start=1))["videos"][0]
        assert (in_range["frames"], in_range["source_frames"], in_range["duration"]) == (6, 12, 2.0)


async def test_several_videos_are_told_one_by_one_and_images_are_left_to_the_engines_count(engine):
    engine.profile, engine.prompt_tokens = QWEN_REDUCED, 300
    image = {"type": "image_url", "image_url": {"url": data_url(picture(), "image/png")}}
    videos = [
        {"type": "video_url", "video_url": {"url": data_url(clip(frames=frames, fps=6), "video/mp4")}}
        for frames in (12, 24)
    ]
    messages = [{"role": "user", "content": [videos[0], image, videos[1], {"type": "text", "text": "Compare."}]}]
    async with gateway(engine) as client:
        told = (await client.post(TOKENS, json=ask(messages=messages))).json()
    assert [video["frames"] for video in told["videos"]] == [4, 8]  # two a second
    for stage in ("before", "after"):
        assert told["video_tokens"][stage] == sum(video["video_tokens"][stage] for video in told["videos"])
    assert told["prompt_tokens"] == 300 + told["video_tokens"]["after"] + 2 * 2
    assert engine.requests[0]["messages"][0]["content"] == [image, {"type": "text", "text": "Compare."}]


async def test_text_around_units_is_in_the_estimate(engine):
    engine.profile = QWEN_REDUCED | {"tokens": QWEN["tokens"] | {"text_per_video": 0, "text_per_unit": 9}}
    async with gateway(engine) as client:
        told = (await client.post(TOKENS, json=ask_about(URL))).json()
    assert told["prompt_tokens"] == 20 + told["video_tokens"]["after"] + 2 * 9


@pytest.mark.parametrize(
    ("profile", "fields", "param", "code"),
    [
        (None, {}, "model", "video_tokens_unknown"),
        (ONE_REDUCED, {"aot": {"retention": 2}}, "aot.retention", "invalid_retention"),
        (ONE_REDUCED, {"aot": {"frames": 99}}, "aot.frames", "invalid_sampling"),
        (ONE_REDUCED, {"model": "other"}, "model", "model_not_found"),
        (ONE_REDUCED, {"messages": [{"role": "user", "content": "Hi"}]}, "messages", None),
    ],
)
async def test_what_cannot_be_counted_is_refused(engine, profile, fields, param, code):
    engine.profile = profile
    async with gateway(engine) as client:
        error = error_of(await client.post(TOKENS, json=ask_about(URL) | fields))
    assert (error["param"], error["code"]) == (param, code)
    assert engine.requests == []


async def test_an_engine_that_refuses_the_text_or_counts_nothing_is_told(engine):
    engine.profile = ONE_REDUCED
    async with gateway(engine) as client:
        engine.error = (
            400,
            b'{"error": {"message": "no such template", "type": "BadRequestError"}}',
            "application/json",
        )
        assert error_of(await client.post(TOKENS, json=ask_about(URL)))["message"] == "no such template"
        engine.error = (200, b"[]", "application/json")
        answer = await client.post(TOKENS, json=ask_about(URL))
        assert answer.status_code == 502
        assert value(client, "inflight_requests") in (0, None)


async def test_a_count_reads_the_video_that_the_chat_then_finds_read(engine):
    engine.profile = ONE_REDUCED
    async with gateway(engine) as client:
        counted = (await client.post(TOKENS, json=ask_about(URL, aot={"retention": 0.5}))).json()
        assert counted["retention"] == 0.5
        assert (await client.post(CHAT, json=ask_about(URL, aot={"retention": 0.5}))).status_code == 200
    (_, sent) = engine.requests
    assert sent["messages"][0]["content"][0]["video_url"]["url"].startswith("data:video/x-aot-frames;base64,")
