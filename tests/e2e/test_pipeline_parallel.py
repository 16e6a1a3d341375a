"""Two stages of a pipeline must answer as one: only the first sees videos, and each rotates by their positions."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.stages import settings_of, steps_of


def answers_of_two_stages(name):
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("pipeline_parallel.py"))],
        input=json.dumps(name),
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"answers"'))
    return seen["answers"]


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "name",
    [slow("tiny"), "qwen2.5-vl", slow("qwen3-vl-4"), slow("qwen3-vl-moe-4"), slow("qwen3.5-4"), slow("qwen3.5-moe-4")],
)
def test_two_stages_answer_as_one(start_engine, name):
    """In chunks, with prefixes found in the cache, about two videos, about a video and an image, side by side.

    The same is calculated in the same order, so that the numbers are equal even in bfloat16.
    """
    seen = answers_of_two_stages(name)
    engine = start_engine(name, **settings_of(name))
    for step, answers in zip(steps_of(name), seen, strict=True):
        for alone, (prompt_tokens, tokens, logprobs) in zip(engine.ask(*step), answers, strict=True):
            assert (prompt_tokens, tuple(tokens)) == (alone.prompt_tokens, alone.tokens)
            assert logprobs == pytest.approx(alone.logprobs, rel=0, abs=1e-5)
