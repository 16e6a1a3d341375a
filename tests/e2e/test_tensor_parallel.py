"""Two ranks, each with half of the attention heads, must keep the same tokens."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.checkpoints import checkpoint
from tests.e2e.engines import request, video


def test_two_ranks_keep_the_same_cells_and_answer_as_one(start_engine):
    script = Path(__file__).with_name("tensor_parallel.py")
    done = subprocess.run(
        [sys.executable, str(script), str(checkpoint("tiny"))], capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"answers"')))
    first, second = seen["ranks"]
    assert len(first) == 3
    assert first == second

    engine = start_engine("tiny", video_pruning_rate=0.75)
    for frames, (prompt_tokens, tokens, logprobs) in zip((1, 8, 33), seen["answers"], strict=True):
        (alone,) = engine.ask(request(video(frames, seed=frames)))
        assert (prompt_tokens, tuple(tokens)) == (alone.prompt_tokens, alone.tokens)
        assert logprobs == pytest.approx(alone.logprobs, rel=0, abs=2e-4)
