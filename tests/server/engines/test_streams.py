import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engines.savings import Savings
from server.engines.streams import LONGEST_EVENT_BYTES, ChatStream
from tests.server.engine_double import DONE, ROLE, TEXT, USAGE, chunk, delta

SAVINGS = Savings(6272, 627, 0.1)
BODY = b"".join([ROLE, *TEXT])
STREAM = BODY + USAGE + DONE


def through(pieces, *, savings=SAVINGS, usage_wanted=True):
    stream = ChatStream(savings=savings, usage_wanted=usage_wanted)
    passed = b"".join(stream.feed(piece) for piece in pieces)
    stream.end()
    return passed, stream


EXPECTED, _ = through([STREAM])


def test_the_usage_chunk_gets_the_savings_and_everything_else_is_untouched():
    assert EXPECTED.startswith(BODY)
    assert EXPECTED.endswith(DONE)
    usage = json.loads(EXPECTED.removeprefix(BODY).removesuffix(DONE).removeprefix(b"data: "))
    original = json.loads(USAGE.removeprefix(b"data: "))
    assert usage["usage"].pop("video_tokens") == {"before": 6272, "after": 627, "retention": 0.1}
    assert usage == original


def test_a_split_at_any_byte_changes_nothing():
    for at in range(1, len(STREAM)):
        passed, stream = through([STREAM[:at], STREAM[at:]])
        assert passed == EXPECTED, at
        assert stream.done
        assert stream.failure is None


def test_byte_by_byte_changes_nothing():
    passed, _ = through([bytes([byte]) for byte in STREAM])
    assert passed == EXPECTED


@given(st.lists(st.integers(0, len(STREAM)), max_size=30), st.booleans(), st.booleans())
def test_any_pieces_give_what_one_piece_gives(cuts, usage_wanted, saved):
    edges = [0, *sorted(cuts), len(STREAM)]
    pieces = [STREAM[a:b] for a, b in itertools.pairwise(edges)]
    savings = SAVINGS if saved else None
    whole, one = through([STREAM], savings=savings, usage_wanted=usage_wanted)
    parts, many = through(pieces, savings=savings, usage_wanted=usage_wanted)
    assert parts == whole
    assert many.tokens == one.tokens == len(TEXT)


def test_an_event_is_passed_on_as_soon_as_it_is_whole():
    stream = ChatStream(savings=None, usage_wanted=False)
    assert stream.feed(ROLE + TEXT[0][:-1]) == ROLE
    assert stream.feed(TEXT[0][-1:]) == TEXT[0]


def test_crlf_streams_pass_untouched():
    crlf = BODY.replace(b"\n\n", b"\r\n\r\n")
    passed, stream = through([crlf[:50], crlf[50:], DONE])
    assert passed == crlf + DONE
    assert stream.done


def test_the_usage_chunk_is_hidden_from_a_client_that_did_not_ask():
    passed, _ = through([STREAM], usage_wanted=False)
    assert passed == BODY + DONE


def test_a_usage_chunk_with_spaces_is_recognised_too():
    spaced = b'data: {"choices": [], "usage": {"prompt_tokens": 1}}\n\n'
    assert through([BODY + spaced + DONE], usage_wanted=False)[0] == BODY + DONE


def test_without_savings_the_usage_chunk_passes_untouched():
    assert through([STREAM], savings=None)[0] == STREAM


def test_text_that_looks_like_usage_passes_untouched():
    tricky = delta('{"choices":[],"usage":{"prompt_tokens":1}} [DONE] "error"')
    assert through([ROLE + tricky + USAGE + DONE])[0].startswith(ROLE + tricky)


def test_continuous_usage_passes_untouched():
    with_usage = chunk(choices=[{"index": 0, "delta": {"content": "a"}}], usage={"prompt_tokens": 1})
    assert through([with_usage + with_usage + DONE])[0] == with_usage + with_usage + DONE


def test_comments_pass_and_are_no_tokens():
    passed, stream = through([b": ping\n\n" + TEXT[0] + b": ping\n\n" + DONE])
    assert passed == b": ping\n\n" + TEXT[0] + b": ping\n\n" + DONE
    assert stream.tokens == 1


@pytest.mark.parametrize("name", ["content", "reasoning", "reasoning_content", "tool_calls"])
def test_the_first_token_is_the_first_chunk_with_output(name):
    stream = ChatStream(savings=None, usage_wanted=False)
    stream.feed(ROLE)
    assert stream.tokens == 0
    stream.feed(chunk(choices=[{"index": 0, "delta": {name: [{"id": "x"}] if name == "tool_calls" else "x"}}]))
    assert stream.tokens == 1


def test_an_error_in_the_stream_is_translated_and_ends_it():
    error = b'data: {"error":{"message":"CUDA error in /opt/vllm/x.py at 10.0.0.3:80","type":"X","code":500}}\n\n'
    passed, stream = through([ROLE + TEXT[0] + error + DONE])
    assert passed == ROLE + TEXT[0]
    assert "10.0.0.3" not in stream.failure.message
    assert not stream.done


def test_an_end_without_done_is_a_failure():
    passed, stream = through([BODY + b"data: {"])
    assert passed == BODY
    assert stream.failure is not None


def test_an_event_without_end_is_a_failure():
    stream = ChatStream(savings=None, usage_wanted=False)
    stream.feed(b"data: " + b"x" * LONGEST_EVENT_BYTES)
    assert stream.failure is not None
