import json

import pytest

from server.engines.profile import PrefillCost
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


COST = PrefillCost(tokens=(100, 1000, 10000), seconds=(1.0, 10.0, 1000.0))
"""Up to 1000 tokens each takes as long; beyond, ten times as many take a hundred times as long."""


@pytest.mark.parametrize(
    ("tokens", "seconds"),
    [
        (0, 0.0),
        (-5, 0.0),
        (1, 1.0),
        (100, 1.0),
        (200, 2.0),
        (1000, 10.0),
        (2000, 40.0),
        (10000, 1000.0),
        (20000, 2000.0),  # less than it takes: a claim beyond what was measured is too small
    ],
)
def test_the_time_of_a_prefill_lies_on_the_curve_that_was_measured(tokens, seconds):
    assert COST.seconds_of(tokens) == pytest.approx(seconds)


SAVINGS = Savings(before=2000, after=200, retention=0.1)


@pytest.mark.parametrize(
    ("usage", "per_token", "seconds"),
    [
        ({"prompt_tokens": 400}, None, (48.4, 4.0)),
        ({"input_tokens": 400}, None, (48.4, 4.0)),
        ({"prompt_tokens": 400}, 0.001, (48.4, 6.0)),
        # the video was in the cache, and would have been there whole: 200 of 400, and 2000 of 2200
        ({"prompt_tokens": 400, "prompt_tokens_details": {"cached_tokens": 400}}, 0.001, (0.0, 0.0)),
        # half of the video's tokens must have been there: 300 of 400, and 300 + 900 of 2200
        ({"prompt_tokens": 400, "prompt_tokens_details": {"cached_tokens": 300}}, 0.001, (34.0, 2.0)),
        # only other tokens may have been there
        ({"input_tokens": 400, "input_tokens_details": {"cached_tokens": 200}}, 0.001, (46.4, 4.0)),
        ({"prompt_tokens": 400, "prompt_tokens_details": None}, None, (48.4, 4.0)),
        ({"prompt_tokens": 400, "prompt_tokens_details": {"cached_tokens": -3}}, None, (48.4, 4.0)),
        ({}, None, None),
        ({"prompt_tokens": None}, None, None),
        ({"prompt_tokens": True}, None, None),
    ],
)
def test_the_time_of_a_request_is_that_of_its_prompt_with_and_without_the_reduction(usage, per_token, seconds):
    cost = COST.model_copy(update={"reduction_seconds_per_token": per_token})
    assert SAVINGS.prefill_seconds(usage, cost) == (seconds and pytest.approx(seconds))


def test_a_video_that_kept_every_token_saves_no_time_and_costs_no_reduction():
    cost = COST.model_copy(update={"reduction_seconds_per_token": 1.0})
    assert Savings(500, 500, 1.0).prefill_seconds({"prompt_tokens": 600}, cost) == (pytest.approx(6.0),) * 2


def test_a_reduction_that_costs_more_than_it_saves_is_said_to():
    cost = COST.model_copy(update={"reduction_seconds_per_token": 1.0})
    whole, reduced = Savings(500, 400, 0.8).prefill_seconds({"prompt_tokens": 500}, cost)
    assert whole - reduced == pytest.approx(6.0 - (5.0 + 500.0))


SHOWN = Savings(before=100, after=10, retention=0.1)


def test_savings_are_put_into_the_usage_and_nothing_before_it_changes():
    body = b'{ "choices": [1.0,  {"usage": {"a": 1}}], "usage": {"prompt_tokens": 20}, "id": "x" }'
    told = with_savings(body, SHOWN)
    begin = body.index(b'"usage": {"prompt')
    assert told[:begin] == body[:begin]
    usage = {"prompt_tokens": 20, "video_tokens": {"before": 100, "after": 10, "retention": 0.1}}
    assert json.loads(told) == {**json.loads(body), "usage": usage}


def test_a_usage_that_is_no_object_is_one_with_savings():
    told = with_savings(b'{"choices":[],"usage":null}', SHOWN)
    assert json.loads(told)["usage"] == {"video_tokens": {"before": 100, "after": 10, "retention": 0.1}}


@pytest.mark.parametrize("body", [b"{}", b"", b"no json", b'{"choices":[{"usage":{}}]}', b'{"x":"\\"usage\\":{}"}'])
def test_without_a_usage_there_is_no_place_for_savings(body):
    assert with_savings(body, SHOWN) is None
