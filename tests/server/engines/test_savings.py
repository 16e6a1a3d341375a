import json

import pytest

from server.engines.savings import Savings, usage_in, with_savings

OURS = {"prompt_tokens": 7, "total_tokens": 9}
THEIRS = {"prompt_tokens": 1, "total_tokens": 1}


@pytest.mark.parametrize(
    "answer",
    [
        {"usage": OURS},
        {"choices": [], "usage": OURS, "prompt_logprobs": None},
        {"choices": [{"usage": THEIRS}], "usage": OURS},
        {"usage": OURS, "kv_transfer_params": {"usage": THEIRS}},
        {"usage": OURS, "choices": [{"message": {"tool": {"deep": [{"usage": THEIRS}]}}}]},
        {"usage": OURS, "choices": [{"message": {"content": '"usage": {"total_tokens": 3}'}}]},
        {"choices": [{"message": {"content": '{"usage":{"total_tokens":3}}'}}], "usage": OURS},
        {"usage": {**OURS, "details": {"usage": THEIRS}}},
    ],
)
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_the_usage_of_an_answer_is_its_own_and_not_one_within(answer, separators):
    assert usage_in(json.dumps(answer, separators=separators).encode()) == answer["usage"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"choices":[{"usage":{"total_tokens":3}}]}',
        b'{"usage":null}',
        b'{"usage":3}',
        b'{"usage":',
        b"\xff",
    ],
)
def test_an_answer_without_usage_has_none(body):
    assert usage_in(body) == {}


SAVINGS = Savings(before=100, after=10, retention=0.1)


def test_savings_are_put_into_the_usage_and_nothing_before_it_changes():
    body = b'{ "choices": [1.0,  {"usage": {"a": 1}}], "usage": {"prompt_tokens": 20}, "id": "x" }'
    told = with_savings(body, SAVINGS)
    begin = body.index(b'"usage": {"prompt')
    assert told[:begin] == body[:begin]
    usage = {"prompt_tokens": 20, "video_tokens": {"before": 100, "after": 10, "retention": 0.1}}
    assert json.loads(told) == {**json.loads(body), "usage": usage}


def test_a_usage_that_is_no_object_is_one_with_savings():
    told = with_savings(b'{"choices":[],"usage":null}', SAVINGS)
    assert json.loads(told)["usage"] == {"video_tokens": {"before": 100, "after": 10, "retention": 0.1}}


@pytest.mark.parametrize("body", [b"{}", b"", b"no json", b'{"choices":[{"usage":{}}]}', b'{"x":"\\"usage\\":{}"}'])
def test_without_a_usage_there_is_no_place_for_savings(body):
    assert with_savings(body, SAVINGS) is None
