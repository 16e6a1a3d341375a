import json

import pytest

from server.engines.savings import usage_in

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
