"""`/v1/responses` about videos, through the gateway and a vLLM server with the plugin."""

import openai
import pytest

from tests.e2e.with_gateway.seen import BEFORE, after, counts, metric

pytestmark = pytest.mark.any_runner

QUESTION = "What happens?"


@pytest.fixture
def client(gateway):
    with openai.OpenAI(base_url=f"{gateway}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def about(url, **fields):
    content = [{"type": "input_video", "video_url": url}, {"type": "input_text", "text": QUESTION}]
    limits = {"max_output_tokens": 4, "temperature": 0}
    return {"model": "fast", "input": [{"role": "user", "content": content}], **limits, **fields}


def chat_about(client, url, **fields):
    content = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(model="fast", messages=messages, max_tokens=4, temperature=0, **fields)


def test_a_response_about_a_video_says_and_saves_what_a_chat_does(client, gateway, clip_url):
    before = metric(gateway, "aot_gateway_video_tokens_total", model="fast", stage="before")
    answer = client.responses.with_raw_response.create(**about(clip_url))
    response, chat = answer.parse(), chat_about(client, clip_url)
    assert response.output_text == chat.choices[0].message.content
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert counts(response.usage.video_tokens) == {"before": BEFORE, "after": after(0.15), "retention": 0.15}
    assert int(answer.headers["x-aot-video-tokens-after"]) == after(0.15)
    assert metric(gateway, "aot_gateway_video_tokens_total", model="fast", stage="before") - before == 2 * BEFORE
    assert (response.model, chat.model) == ("fast", "fast")


def test_a_response_may_name_its_retention(client, clip_url):
    usage = client.responses.create(**about(clip_url), extra_body={"aot": {"retention": 0.4}}).usage
    assert usage.video_tokens["after"] == after(0.4)


def test_a_stream_about_a_video_ends_with_what_it_saved(client, clip_url):
    events = list(client.responses.create(**about(clip_url), stream=True))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == client.responses.create(**about(clip_url)).output_text
    assert events[-1].response.usage.video_tokens["after"] == after(0.15)
    assert events[-1].response.model == events[0].response.model == "fast"


def test_a_video_that_was_asked_about_is_told_to_be_cached(client, clip_url):
    for _ in range(2):
        usage = chat_about(client, clip_url, extra_body={"aot": {"retention": 0.5}}).usage
    video_tokens, details = usage.video_tokens, usage.prompt_tokens_details
    assert video_tokens["cached"] == details.cached_tokens - (usage.prompt_tokens - after(0.5))
    assert 0 < video_tokens["cached"] <= after(0.5)
