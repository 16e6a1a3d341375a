"""Two ranks must keep the same tokens: where each has half of the attention heads, and where it has them all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.ranks import requests_to


def answers_of_two_ranks(name, mode, settings):
    """Return answers and kept cells of a checkpoint with its tower in one of vLLM's modes, and settings of ours."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("tensor_parallel.py"))],
        input=json.dumps([(name, mode, settings)]),
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return next(json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"answers"'))


def on(runner, name, mode, **settings):
    """Each takes a minute: what one runner shows is left to it."""
    return pytest.param(name, mode, settings, marks=[pytest.mark.only_on(runner), pytest.mark.slow])


@pytest.mark.parametrize(
    ("name", "mode", "settings"),
    [
        on("v1", "tiny", "weights", anchors="attention"),
        on("v1", "qwen2.5-vl", "weights", anchors="attention"),
        on("v1", "qwen3-vl", "data"),
        on("v2", "qwen3-vl", "weights"),
    ],
)
def test_two_ranks_keep_the_same_cells_and_answer_as_one(start_engine, name, mode, settings):
    """They share a tower's weights, or each has all of them (`data`), where vLLM would deal out items."""
    seen = answers_of_two_ranks(name, mode, settings)
    first, second = seen["ranks"]
    assert len(first) == 3
    assert first == second

    engine = start_engine(name, video_pruning_rate=0.75, additional_config={"aot": settings})
    for asked, (prompt_tokens, tokens, logprobs) in zip(requests_to(name), seen["answers"], strict=True):
        (alone,) = engine.ask(asked)
        assert (prompt_tokens, tuple(tokens)) == (alone.prompt_tokens, alone.tokens)
        assert logprobs == pytest.approx(alone.logprobs, rel=0, abs=2e-4)
