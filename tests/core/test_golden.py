"""Numbers measured from the authors' released code."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from aot_vllm import AOTConfig
from aot_vllm.core.anchors import select_anchors
from aot_vllm.core.transport import absorb_frames, merge_across_frames, merge_within_frames
from tests.golden.inputs import SIDE, make_inputs

GOLDEN = Path(__file__).parents[1] / "golden"
# Entries near zero are sums of terms of order 1 that cancel. Their float32 rounding error is about 1e-6.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture(scope="module")
def within():
    return np.load(GOLDEN / "aot_a.npz")


@pytest.fixture(scope="module")
def across():
    return np.load(GOLDEN / "phase2_p.npz")


def test_anchors_are_those_of_the_released_code(within):
    _, local, glob = make_inputs(within["seed"].item(), within["frames"].item(), within["dim"].item())
    chosen = select_anchors(local, glob, rows=SIDE, cols=SIDE, count=within["visual_token_num"].item())
    assert np.array_equal(chosen.numpy(), within["anchor_idx"])


def test_merging_within_frames_is_that_of_the_released_code(within):
    features, _, _ = make_inputs(within["seed"].item(), within["frames"].item(), within["dim"].item())
    anchors = torch.from_numpy(within["anchor_idx"]).long()
    merged = merge_within_frames(features, anchors, rows=SIDE, cols=SIDE, config=AOTConfig.paper())
    torch.testing.assert_close(merged[:2], torch.from_numpy(within["merged"]), **CLOSE)


def test_the_released_stopping_rule_ends_the_solve_within_frames_after_5_iterations(within):
    features, _, _ = make_inputs(within["seed"].item(), within["frames"].item(), within["dim"].item())
    anchors = torch.from_numpy(within["anchor_idx"]).long()
    solution = absorb_frames(features, anchors, rows=SIDE, cols=SIDE, config=AOTConfig.paper())
    assert solution.iterations.tolist() == [5]
    assert solution.converged.tolist() == [True]


def test_merging_across_frames_is_that_of_the_released_code(across):
    features, _, glob = make_inputs(across["seed"].item(), across["frames"].item(), across["dim"].item())
    size = across["anchors"].item()
    anchors = glob.topk(size, dim=1).indices.sort(dim=1).values
    tokens = features.gather(1, anchors.unsqueeze(2).expand(-1, -1, features.shape[2]))
    keep = math.ceil(across["keep_ratio"].item() * (size - 1))
    clips = merge_across_frames(tokens, clip_lengths=[4] * 8, keep=keep, config=AOTConfig.paper())

    later = [frame for frame in range(32) if frame % 4]
    kept = torch.zeros(32, size, dtype=torch.bool)
    kept[clips.frames, clips.slots] = True
    assert np.array_equal(kept[later].numpy(), across["keep_mask"])
    torch.testing.assert_close(clips.tokens, torch.from_numpy(across["tokens"]), **CLOSE)
    assert clips.iterations.max() <= 9
    assert clips.converged.all()


def test_the_default_iterations_change_nothing_on_the_golden_input(within):
    features, _, _ = make_inputs(within["seed"].item(), within["frames"].item(), within["dim"].item())
    anchors = torch.from_numpy(within["anchor_idx"]).long()
    paper = AOTConfig.paper()
    fewer, all_of_them = (
        merge_within_frames(features, anchors, rows=SIDE, cols=SIDE, config=config)
        for config in (replace(paper, iterations=AOTConfig().iterations), paper)
    )
    assert torch.equal(fewer, all_of_them)
