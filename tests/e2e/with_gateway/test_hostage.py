"""What one client sends to a real engine does not reach another client."""

import base64
import threading
import time

import httpx
import pytest

from demo.clip import write_clip
from tests.e2e.with_gateway.seen import metric, wait_until

pytestmark = pytest.mark.any_runner

TIMES = 5
"""More often than broken answers in a row open the breaker."""


@pytest.fixture
def clip_of(tmp_path):
    """Return a function from a number to the base64 of a clip that no other test has asked about."""

    def encoded(number):
        path = tmp_path / f"{number}.mp4"
        write_clip(path, frames=50 + number, height=96, width=128)
        return base64.b64encode(path.read_bytes()).decode()

    return encoded


def about(clip, *, head="data:video/mp4;base64,", **fields):
    video = {"type": "video_url", "video_url": {"url": head + clip}}
    content = [video, {"type": "text", "text": "What happens?"}]
    return {"model": "fast", "messages": [{"role": "user", "content": content}], "max_tokens": 2, **fields}


TRIGGERS = {
    "base64 in capitals": {"head": "data:video/mp4;BASE64,"},
    "truncated beside a video": {"truncate_prompt_tokens": 20},
    "an unfinished grammar": {"structured_outputs": {"grammar": "root ::= ("}},
    "an unfinished regex": {"structured_outputs": {"regex": "(a"}},
    "an unknown token": {"logit_bias": {"9999999": 1}},
    "too few tokens": {"min_tokens": 9},
}


class GoodClient(threading.Thread):
    """A client that asks one question after another until `stop` is set."""

    def __init__(self, gateway, request):
        super().__init__()
        self.gateway, self.request = gateway, request
        self.stop = threading.Event()
        self.statuses = []

    def run(self):
        with httpx.Client(timeout=60) as client:
            while not self.stop.is_set():
                self.statuses.append(client.post(f"{self.gateway}/v1/chat/completions", json=self.request).status_code)
                time.sleep(0.05)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.join()


@pytest.mark.parametrize("name", TRIGGERS)
def test_a_good_client_notices_nothing_of_a_bad_one(gateway, clip_url, clip_of, name):
    good = about(clip_url.partition(",")[2])
    assert httpx.post(f"{gateway}/v1/chat/completions", json=good, timeout=60).status_code == 200
    bad = about(clip_of(list(TRIGGERS).index(name)), **TRIGGERS[name])
    with GoodClient(gateway, good) as client:
        for _ in range(TIMES):
            assert httpx.post(f"{gateway}/v1/chat/completions", json=bad, timeout=60).status_code != 503
        begun = len(client.statuses)
        wait_until(lambda: len(client.statuses) >= begun + TIMES, seconds=60)
    assert set(client.statuses) == {200}
    assert metric(gateway, "aot_gateway_engine_breaker_open") == 0
    assert metric(gateway, "aot_gateway_engine_up") == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["an unfinished grammar", "an unknown token", "too few tokens"])
def test_the_next_question_about_a_video_is_answered_after_one_that_was_refused(gateway, clip_of, name, stream):
    clip = clip_of(20 + 2 * list(TRIGGERS).index(name) + stream)
    retries = metric(gateway, "aot_gateway_upstream_retries_total", reason="cache_miss")
    refused = httpx.post(
        f"{gateway}/v1/chat/completions", json=about(clip, stream=stream, **TRIGGERS[name]), timeout=60
    )
    assert refused.status_code == 400
    answer = httpx.post(f"{gateway}/v1/chat/completions", json=about(clip, stream=stream), timeout=60)
    assert answer.status_code == 200
    assert "x-should-retry" not in answer.headers
    assert answer.headers["x-aot-video-retention"] == "0.15"
    assert '"error"' not in answer.text
    assert answer.text.endswith("data: [DONE]\n\n") == stream
    assert metric(gateway, "aot_gateway_upstream_retries_total", reason="cache_miss") == retries + 1
