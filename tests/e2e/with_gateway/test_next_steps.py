"""What a real engine complains about is told with the next step, and the step helps."""

import re

import httpx
import pytest

pytestmark = pytest.mark.any_runner


def about(url, text, **fields):
    content = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": text}]
    return {"model": "whole", "messages": [{"role": "user", "content": content}], "max_tokens": 4, **fields}


@pytest.fixture
def post(gateway):
    with httpx.Client(base_url=gateway, timeout=60) as client:
        yield lambda path, body: client.post(path, json=body)


def test_a_prompt_too_long_by_its_video_fits_as_it_is_told_to(post, clip_url):
    def told(text):
        return post("/v1/video/tokens", about(clip_url, text)).json()

    short, longer = told("a "), told("a " * 1001)
    per_word = (longer["prompt_tokens"] - short["prompt_tokens"]) / 1000
    text = "a " * int((short["context_length"] - short["prompt_tokens"] + 100) / per_word)  # 100 tokens too many
    refused = post("/v1/chat/completions", about(clip_url, text))
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["code"] == "context_length_exceeded"
    found = re.search(r"with aot\.retention ([\d.]+) at most, or with aot\.tokens (\d+) at most", error["message"])
    assert found, error["message"]
    for aot in ({"retention": float(found[1])}, {"tokens": int(found[2])}):
        assert post("/v1/chat/completions", about(clip_url, text, aot=aot)).status_code == 200
    more = {"retention": round(float(found[1]) + 0.03, 2)}  # with room for the answer that was asked for
    assert post("/v1/chat/completions", about(clip_url, text, aot=more)).status_code == 400


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": "hot"}, r"temperature must be a valid number"),
        ({"stop": [1, 2]}, r"stop\S* must be a valid string"),
        ({"temperature": -1}, r"temperature must be non-negative"),
        ({"messages": [{"role": "user", "content": 7}]}, r""),
    ],
)
def test_no_complaint_of_the_engine_is_a_dump_of_pydantics(post, fields, message):
    answer = post("/v1/chat/completions", {"model": "fast", "messages": [{"role": "user", "content": "Hi"}], **fields})
    assert answer.status_code == 400
    told = answer.json()["error"]["message"]
    assert re.match(message, told), told
    assert not re.search(r"validation error|_embeds|'loc'|'type':", told), told
