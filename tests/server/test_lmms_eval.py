"""The requests of lmms-eval's OpenAI model (`openai`, 0.7.3), sent with the same SDK calls but without lmms-eval."""

import openai
import pytest

from server.settings import Settings
from tests.server.clips import clip, data_url, picture
from tests.server.harness import served
from tests.server.media.hosts import MediaHost

FRAMES = [data_url(picture(16, 16 + number), "image/png") for number in range(11)]


def sampled(*parts, **fields):
    """A request as lmms-eval makes it, with its default values."""
    content = [*parts, {"type": "text", "text": "What happens?"}]
    return {
        "messages": [{"role": "user", "content": content}],
        "model": "llava",
        "max_tokens": 1024,
        "temperature": 0,
        **fields,
    }


def frame(url):
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.fixture
async def site(engine):
    async with MediaHost().serving() as host:
        settings = Settings(engines=(engine.url,), media_allow_hosts=(host.host,), media_allow_http=True)
        async with served(settings) as url, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="EMPTY") as client:
            yield client.chat.completions, engine, host


async def test_videos_that_it_takes_apart_reach_the_engine_as_the_frames_they_are(site):
    completions, engine, _ = site
    asked = sampled(*map(frame, FRAMES), top_p=0.9, seed=7)
    thinking = {"chat_template_kwargs": {"enable_thinking": False}}
    answer = await completions.create(**asked, extra_body=thinking)
    assert answer.choices[0].message.content.startswith("Ein Hund")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (640, 12)
    assert engine.requests == [{**asked, **thinking}]


async def test_videos_that_it_passes_on_are_taken_but_not_its_wish_for_a_number_of_frames(site):
    completions, engine, host = site
    video = {"type": "video_url", "video_url": {"url": f"{host.url}/clip.mp4"}}
    wish = {"media_io_kwargs": {"video": {"num_frames": 10}}}
    with pytest.raises(openai.BadRequestError) as caught:
        await completions.create(**sampled(video), extra_body=wish)
    assert caught.value.param == "media_io_kwargs"
    with pytest.raises(openai.BadRequestError, match="is a path, and this gateway reads no files of clients"):
        await completions.create(**sampled({"type": "video_url", "video_url": {"url": "file:///data/clip.mp4"}}))
    assert engine.requests == []
    await completions.create(**sampled(video))
    assert engine.requests[0]["messages"][0]["content"][0]["video_url"]["url"] == data_url(clip())


async def test_what_failed_is_repeated_by_its_own_loop_alone_and_a_limit_is_known_as_one(site):
    completions, engine, _ = site
    engine.error = (502, b"{}", "application/json")  # a 500 about media is asked for once more by the gateway itself
    with pytest.raises(openai.InternalServerError):
        await completions.create(**sampled(*map(frame, FRAMES)))
    assert len(engine.requests) == 1
    engine.error = (429, b'{"error":{"message":"full","code":429}}', "application/json")
    with pytest.raises(openai.RateLimitError, match="429"):  # lmms-eval looks for the number in the text
        await completions.create(**sampled())
