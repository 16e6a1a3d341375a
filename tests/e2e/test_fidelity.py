"""The benchmark of answers through real vLLM: that every arm reaches the engine and keeps what it says."""

import re
import subprocess
import sys

import pytest
import torch

from aot_vllm import AOTConfig, VideoGrid
from aot_vllm.core.budget import budget
from bench import arms
from bench.arms import ABLATIONS, ARMS
from demo.tiny_checkpoints import ROOT

pytestmark = [pytest.mark.any_runner, pytest.mark.slow]

GRID = VideoGrid(frames=16, rows=6, cols=6)


@pytest.mark.parametrize("name", [*ARMS, *ABLATIONS])
def test_an_arm_keeps_as_many_tokens_as_the_prompt_has_places_for(name, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(16, 36, 8, generator=generator)
    scores = torch.rand(2, 16, 36, generator=generator)
    monkeypatch.setattr(arms, "UNPOOLED", [torch.randn(16, 144, 8, generator=generator)])
    for retention in (0.5, 0.25, 0.1, 0.05):
        total = budget(GRID, retention=retention).total
        if name == "EVS" and total < GRID.positions:
            continue
        reduced = (ARMS | ABLATIONS)[name](features, *scores, grid=GRID, retention=retention, config=AOTConfig())
        assert reduced.tokens.shape == (total, 8)
        cells = (reduced.frames * 6 + reduced.rows) * 6 + reduced.cols
        if name in ARMS and not name.startswith("AOT"):  # which moves what others know into its tokens
            assert torch.equal(reduced.tokens, features.reshape(576, 8)[cells])


def test_questions_are_answered_by_every_arm():
    command = [sys.executable, "bench/fidelity.py", "--clips=2", "--retentions", "0.1", "--arms", "AOT", "uniform"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    overall, *_ = done.stdout.partition("| at ")
    (whole,) = re.findall(r"everything: ([\d.]+)%", overall)
    shares = dict(re.findall(r"^\| (AOT|uniform) \| ([\d.]+)%", overall, re.MULTILINE))
    assert float(whole) > 70
    assert {*shares} == {"AOT", "uniform"}
    assert len({whole, *shares.values()}) == 3  # no arm is given the answers of another
    assert re.search(r"2 clips of the test split, \d+ questions", done.stdout)
