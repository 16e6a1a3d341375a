"""Two ranks must keep the same tokens: where each has half of the attention heads, and where it has them all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.ranks import requests_to


def answers_of_two_ranks(*engines):
    """Return answers and kept cells for each checkpoint and tower mode, started in turn in one process."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("tensor_parallel.py"))],
        input=json.dumps(engines),
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"answers"')]


@pytest.mark.parametrize(
    "engines",
    [
        pytest.param(
            [("tiny", "weights"), ("qwen2.5-vl", "weights"), ("qwen3-vl", "data")], marks=pytest.mark.only_on("v1")
        ),
        pytest.param([("qwen3-vl", "weights"), ("qwen2.5-vl", "data")], marks=pytest.mark.only_on("v2")),
    ],
    ids=lambda engines: ", ".join(f"{name} {mode}" for name, mode in engines),
)
def test_two_ranks_keep_the_same_cells_and_answer_as_one(start_engine, engines):
    """They share a tower's weights, or each has all of them (`data`), where vLLM would deal out items."""
    for (name, _), seen in zip(engines, answers_of_two_ranks(*engines), strict=True):
        first, second = seen["ranks"]
        assert len(first) == 3
        assert first == second

        engine = start_engine(name, video_pruning_rate=0.75)
        for asked, (prompt_tokens, tokens, logprobs) in zip(requests_to(name), seen["answers"], strict=True):
            (alone,) = engine.ask(asked)
            assert (prompt_tokens, tuple(tokens)) == (alone.prompt_tokens, alone.tokens)
            assert logprobs == pytest.approx(alone.logprobs, rel=0, abs=2e-4)
