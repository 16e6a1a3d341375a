"""Speculative decoding behind a reduced video: drafts change when tokens come, never which."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.qwen import made, qwen_request

REQUESTS = [[["video", frames, frames], "What, what, what happens?"] for frames in (9, 6)]


@pytest.mark.only_on("v1")  # Triton's interpreter can't run what the other runner's sampler does with drafts
def test_drafts_looked_up_in_the_prompt_change_no_token(start_engine):
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("speculation.py"))],
        input=json.dumps(["qwen2.5-vl", *REQUESTS]),
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"answers"')))
    assert seen["accepted"] > 0
    engine = start_engine("qwen2.5-vl", video_pruning_rate=0.75)
    for parts, (tokens, logprobs) in zip(REQUESTS, seen["answers"], strict=True):
        (answer,) = engine.ask(qwen_request(*made(parts)), max_tokens=24)
        assert tuple(tokens) == answer.tokens
        assert logprobs == pytest.approx(answer.logprobs, rel=0, abs=2e-4)
