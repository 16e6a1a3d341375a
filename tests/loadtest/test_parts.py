"""What the load test is made of: videos, arms, shapes, and the reading of streams."""

import base64
import io
import itertools
import json
from urllib.request import urlopen

import av
import pytest

from loadtest.arms import Arm, arms_in
from loadtest.shapes import stages, users_at
from loadtest.stream import read_answer
from loadtest.videos import Video, sizes_in
from tests.server.clips import clip
from tests.server.engine_double import DONE, ROLE, TEXT, chunk


def frames_of(url: str) -> int:
    with av.open(io.BytesIO(base64.b64decode(url.partition(",")[2], validate=True))) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.mark.parametrize("surplus", range(3))
def test_a_new_copy_of_a_video_is_another_file_with_the_same_pictures(surplus):
    video = Video(clip() + bytes(0) if not surplus else clip(frames=12 + surplus))
    copies = {video.new_url() for _ in range(20)}
    assert len(copies) == 20
    assert video.url == video.url not in copies
    assert {frames_of(url) for url in (video.url, *copies)} == {12 + surplus}


def test_a_data_url_is_what_every_reader_takes_for_one():
    with urlopen(Video(clip()).new_url()) as opened:
        assert opened.read().startswith(clip())


def test_sizes_are_read_and_odd_ones_refused():
    assert sizes_in("480x360, 64x48") == [(480, 360), (64, 48)]
    for wrong in ("", "480", "480x", "0x48", "65x48", "480x360,", "axb"):
        with pytest.raises(ValueError, match=r"sizes must be|must be even"):
            sizes_in(wrong)


def test_arms_are_aliases_or_retentions_that_the_request_asks_for():
    assert arms_in("off=llava@1, aot=llava-fast") == [Arm("off", "llava", 1.0), Arm("aot", "llava-fast")]
    for wrong in ("", "off", "off=", "=llava", "off=llava@", "off=llava@0", "off=llava@1.5", "off=llava@nan"):
        with pytest.raises(ValueError, match="arms must be like"):
            arms_in(wrong)
    with pytest.raises(ValueError, match="name of its own"):
        arms_in("off=a,off=b")


def test_only_an_arm_with_a_retention_asks_for_one_and_only_a_video_is_sent_as_one():
    by_field = Arm("aot", "llava", 0.1).request("data:video/mp4;base64,AA", max_tokens=4)
    by_alias = Arm("aot", "llava-fast").request(None, max_tokens=4)
    assert by_field["aot"] == {"retention": 0.1}
    assert [part["type"] for part in by_field["messages"][0]["content"]] == ["video_url", "text"]
    assert "aot" not in by_alias
    assert [part["type"] for part in by_alias["messages"][0]["content"]] == ["text"]


def test_shapes_reach_all_users_and_last_the_whole_time():
    assert stages("soak", users=20, seconds=100) == [(100, 20)]
    assert stages("steps", users=20, seconds=100) == [(20, 4), (40, 8), (60, 12), (80, 16), (100, 20)]
    assert stages("spike", users=20, seconds=100) == [(40, 2), (60, 20), (100, 2)]
    plan = stages("spike", users=20, seconds=100)
    assert [users_at(moment, plan) for moment in (0, 39.9, 40, 99, 100)] == [2, 2, 20, 2, None]


def lines(*events: bytes) -> list[bytes]:
    return b"".join(events).splitlines(keepends=True)


def test_the_first_token_is_the_first_text_not_the_role():
    ticks = itertools.count()
    usage = chunk(choices=[], usage={"prompt_tokens": 9, "completion_tokens": 4, "video_tokens": {"before": 8}})
    answer = read_answer(lines(ROLE, *TEXT, usage, DONE), lambda: float(next(ticks) ** 2))
    assert answer.first_token == 0
    assert answer.gaps == [1, 3, 5]
    assert answer.tokens() == {"prompt": 9, "answer": 4, "video before": 8}
    assert answer.problem is None


@pytest.mark.parametrize(
    ("events", "problem"),
    [
        ([ROLE, *TEXT], "the stream broke off"),
        ([ROLE, DONE], "the stream held no token"),
        (
            [ROLE, TEXT[0], b"data: " + json.dumps({"error": {"code": "engine_failed"}}).encode() + b"\n\n"],
            "engine_failed",
        ),
        ([], "the stream broke off"),
    ],
)
def test_a_stream_that_is_no_whole_answer_says_why(events, problem):
    assert problem in read_answer(lines(*events), lambda: 0.0).problem
