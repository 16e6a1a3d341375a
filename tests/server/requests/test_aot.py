import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.aliases import Asked, Sampling
from server.errors import InvalidRequest, RetentionRefused, SamplingRefused
from server.requests.aot import KEYS, read_aot


def test_without_aot_nothing_is_asked():
    assert read_aot(None) == read_aot({}) == read_aot(dict.fromkeys(KEYS)) == Asked()


def test_all_that_can_be_asked_is_read():
    asked = read_aot({"tokens": 2000, "fps": 1, "start": 30, "end": 60.5})
    assert asked == Asked(tokens=2000, sampling=Sampling(fps=1.0, start_seconds=30.0, end_seconds=60.5))
    assert read_aot({"retention": 1, "frames": 64}) == Asked(retention=1.0, sampling=Sampling(frames=64))
    assert read_aot({"start": 0}).sampling == Sampling(start_seconds=0.0)


@pytest.mark.parametrize(
    ("fields", "param", "error"),
    [
        ({"tokens": 0}, "tokens", RetentionRefused),
        ({"tokens": 1.5}, "tokens", RetentionRefused),
        ({"tokens": True}, "tokens", RetentionRefused),
        ({"tokens": "2000"}, "tokens", RetentionRefused),
        ({"frames": 0}, "frames", SamplingRefused),
        ({"frames": -3}, "frames", SamplingRefused),
        ({"frames": 10**12}, "frames", SamplingRefused),
        ({"frames": [1]}, "frames", SamplingRefused),
        ({"fps": 0}, "fps", SamplingRefused),
        ({"fps": math.nan}, "fps", SamplingRefused),
        ({"fps": math.inf}, "fps", SamplingRefused),
        ({"fps": False}, "fps", SamplingRefused),
        ({"start": -1}, "start", SamplingRefused),
        ({"start": "0"}, "start", SamplingRefused),
        ({"end": 0}, "end", SamplingRefused),
        ({"start": 5, "end": 5}, "end", SamplingRefused),
        ({"start": 5, "end": 2}, "end", SamplingRefused),
        ({"retention": 0.1, "tokens": 5}, "tokens", InvalidRequest),
        ({"frames": 8, "fps": 1}, "fps", InvalidRequest),
        ({"epsilon": 1}, "epsilon", InvalidRequest),
    ],
)
def test_what_cant_be_asked_is_refused_by_name(fields, param, error):
    with pytest.raises(error, match=param) as caught:
        read_aot(fields)
    assert caught.value.param == f"aot.{param}"


def test_an_unknown_key_is_told_which_there_are():
    with pytest.raises(InvalidRequest, match="retention, tokens, frames, fps, start, end"):
        read_aot({"rate": 1})


values = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.integers(), max_size=2)
)


@given(st.dictionaries(st.sampled_from(KEYS), values))
def test_whatever_is_sent_is_read_or_refused(fields):
    try:
        asked = read_aot(fields)
    except InvalidRequest:
        return
    sampling = asked.sampling
    assert asked.retention is None or 0 < asked.retention <= 1
    assert asked.tokens is None or asked.tokens >= 1
    assert sampling.frames is None or sampling.frames >= 1
    assert sampling.end_seconds is None or sampling.end_seconds > (sampling.start_seconds or 0)
