"""Fields that would do nothing are refused, by name and with the field that does what their sender wants."""

import json

import pytest

from server.errors import InvalidRequest
from server.requests.chat import parse_chat_request
from tests.server.clips import clip, data_url, picture
from tests.server.harness import CHAT, ask, ask_about, error_of, gateway

VIDEO = data_url(clip())
IMAGE = {"type": "image_url", "image_url": {"url": data_url(picture(), "image/png"), "detail": "low"}}


def about(part, **fields):
    return ask(messages=[{"role": "user", "content": [part]}], **fields)


def refusal(request):
    with pytest.raises(InvalidRequest) as caught:
        parse_chat_request(json.dumps(request).encode())
    assert caught.value.code == "misplaced_field"
    return caught.value


@pytest.mark.parametrize(
    ("field", "place"),
    [
        ({"retention": 0.1}, "aot.retention"),
        ({"aot_retention": 0.1}, "aot.retention"),
        ({"video_pruning_rate": 0.9}, "aot.retention"),
        ({"extra_body": {"aot": {"retention": 0.1}}}, '"aot": {"retention": 0.15}'),
        ({"extra_body": {}}, "fields of the request"),
    ],
)
def test_at_the_top_of_a_request_they_are_refused_with_and_without_videos(field, place):
    for request in (ask(**field), ask_about(VIDEO, **field), ask(**field, aot={"retention": 0.5})):
        error = refusal(request)
        assert error.param == next(iter(field))
        assert place in error.message


BESIDE_VIDEOS = [
    *(("fps", 2, "aot.fps"), ("num_frames", 8, "aot.frames"), ("max_frames", 8, "aot.frames")),
    *(("detail", "low", "aot.retention, aot.tokens or aot.frames"), ("start", 1, "aot.start"), ("end", 2, "aot.end")),
    *(("max_pixels", 1, "aot.retention"), ("retention", 0.1, "aot.retention"), ("tokens", 100, "aot.tokens")),
]


@pytest.mark.parametrize(("name", "value", "place"), BESIDE_VIDEOS)
@pytest.mark.parametrize(
    ("part", "where"),
    [
        ({"type": "video_url", "video_url": {"url": VIDEO}}, "messages[0].content[0]."),
        ({"type": "video_url", "video_url": {"url": VIDEO}}, "messages[0].content[0].video_url."),
        ({"video_url": VIDEO}, "messages[0].content[0]."),
        ({"type": "file", "file": {"file_data": VIDEO}}, "messages[0].content[0].file."),
        ({"type": "file", "file": {"file_id": "file-1"}}, "messages[0].content[0]."),
        ({"type": "video_url", "video_url": {"url": VIDEO}}, ""),
    ],
)
def test_beside_a_video_they_are_refused(part, where, name, value, place):
    part, extra = json.loads(json.dumps(part)), {name: value}
    if where.endswith(("video_url.", "file.")):
        part[where.split(".")[-2]].update(extra)
    elif where:
        part.update(extra)
    error = refusal(about(part, **({} if where else extra)))
    assert error.param == f"{where}{name}"
    assert place in error.message


def test_options_of_a_part_are_told_to_be_those_of_the_request():
    error = refusal(about({"type": "video_url", "video_url": {"url": VIDEO}, "aot": {"retention": 0.1}}))
    assert error.param == "messages[0].content[0].aot"


@pytest.mark.parametrize(
    "request_fields",
    [
        about(IMAGE),
        ask(fps=2, detail="low", frames=3, start=1),
        ask(retention=None, extra_body=None),
        ask_about(VIDEO, retention=None, fps=None, metadata={"fps": 2}),
        about({"type": "video_url", "video_url": {"url": VIDEO, "format": "mp4"}, "cache_control": {"type": "x"}}),
        ask_about(VIDEO, unknown_field={"a": 1}),
    ],
)
def test_other_fields_pass_as_ever(request_fields):
    parse_chat_request(json.dumps(request_fields).encode())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, ask(retention=0.1)),
        ("/v1/responses", {"model": "llava", "input": "hi", "retention": 0.1}),
        ("/v1/completions", {"model": "llava", "prompt": "hi", "retention": 0.1}),
    ],
)
async def test_every_endpoint_refuses_them_before_the_engine_is_asked(engine, path, body):
    async with gateway(engine) as client:
        answer = await client.post(path, json=body)
    assert answer.status_code == 400
    assert (error_of(answer)["param"], error_of(answer)["code"]) == ("retention", "misplaced_field")
    assert engine.requests == []


@pytest.mark.parametrize(
    ("name", "instead"), [("mm_processor_kwargs", "aot.retention"), ("media_io_kwargs", "aot.fps")]
)
async def test_what_only_the_operator_may_set_comes_with_what_a_client_may(engine, name, instead):
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask(**{name: {"fps": 2}}))
    assert error_of(answer)["code"] == "forbidden_field"
    assert instead in error_of(answer)["message"]
