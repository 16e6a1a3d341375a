"""A reduction is few launches, nothing waits for the device, and memory grows with the positions of a frame."""

import dataclasses

import pytest
import torch

from aot_vllm import AOTConfig, VideoGrid, reduce_video
from aot_vllm.core.algorithms import TORCH
from aot_vllm.kernels.dispatch import algorithms_for
from bench.on_gpu.calls import own_launches
from tests.kernels.counting import Operations, Waits

pytest.importorskip("triton")

TRITON = algorithms_for(torch.device("meta"), kernels="triton")
MASS = AOTConfig(mass=0.2)
ATTENTION = AOTConfig(anchors="attention", mass=0.2)
CALIBRATED, COVERAGE = AOTConfig.preset("calibrated"), AOTConfig.preset("coverage")
VIDEOS = [
    (VideoGrid(32, 14, 14), 3584),  # LLaVA-OneVision
    (VideoGrid(64, 15, 20), 3584),  # Qwen2.5-VL
    (VideoGrid(384, 10, 10), 4096),  # Qwen3-VL
    (VideoGrid(768, 15, 20), 3584),
    (VideoGrid(1, 27, 27), 1152),
    (VideoGrid(33, 1, 7), 64),
    (VideoGrid(768, 27, 27), 1152),
    (VideoGrid(3, 1, 4097), 64),  # no table of distances from here on
    (VideoGrid(40, 60, 100), 64),
    (VideoGrid(100, 64, 64), 3584),  # the tables of a third of the video would take more than its features
]


def reduce(grid, width, *, retention, config=None, algorithms=TRITON, dtype=torch.bfloat16):
    features = torch.empty(grid.frames, grid.positions, width, device="meta", dtype=dtype)
    scores = torch.empty(grid.frames, grid.positions, device="meta")
    return reduce_video(features, scores, scores, grid=grid, retention=retention, config=config, algorithms=algorithms)


@pytest.mark.parametrize("retention", [0.03, 0.1, 0.25, 0.77])
@pytest.mark.parametrize(("grid", "width"), VIDEOS)
@pytest.mark.parametrize("config", [AOTConfig(), MASS])
def test_a_video_takes_at_most_40_launches_whatever_its_number_of_frames(grid, width, retention, config):
    with own_launches() as launched, Operations() as operations:
        reduce(grid, width, retention=retention, config=config)
    assert len(operations.names) + len(launched) <= 40, (operations.names, launched)


@pytest.mark.parametrize("memory", ["previous", "carried", "all"])
@pytest.mark.parametrize(("grid", "width"), VIDEOS)
def test_so_it_does_with_any_memory(grid, width, memory):
    with own_launches() as launched, Operations() as operations:
        reduce(grid, width, retention=0.1, config=AOTConfig(memory=memory, distance="cosine"))
    assert len(operations.names) + len(launched) <= 40, (operations.names, launched)


@pytest.mark.parametrize("memory", ["previous", "carried"])
@pytest.mark.parametrize(("grid", "width"), [video for video in VIDEOS if video[0].positions <= 1024])
def test_anchors_that_cover_take_few_launches_more(grid, width, memory):
    config = dataclasses.replace(COVERAGE, memory=memory)
    with own_launches() as launched, Operations() as operations:
        reduce(grid, width, retention=0.1, config=config)
    assert len(operations.names) + len(launched) <= 45, (operations.names, launched)


@pytest.mark.parametrize("retention", [0.1, 0.25])
@pytest.mark.parametrize("config", [ATTENTION, CALIBRATED], ids=["attention", "calibrated"])
@pytest.mark.parametrize(("grid", "width"), VIDEOS)
def test_with_attention_scores_a_video_takes_at_most_60_launches(grid, width, retention, config):
    query = torch.empty(grid.frames, grid.positions, 16 * 72, device="meta", dtype=torch.bfloat16)
    features = torch.empty(grid.frames, grid.positions, width, device="meta", dtype=torch.bfloat16)
    with own_launches() as launched, Operations() as operations:
        scores = [TRITON.attention_received(query, query, num_heads=16, scale=0.1) / 16 for _ in range(2)]
        reduce_video(features, *scores, grid=grid, retention=retention, config=config, algorithms=TRITON)
    assert len(operations.names) + len(launched) <= 60, (operations.names, launched)


def test_a_choice_without_a_table_is_one_launch_of_our_own():
    for frames in (1, 500):
        features = torch.empty(frames, 4097, 8, device="meta", dtype=torch.bfloat16)
        with own_launches() as launched, Operations() as operations:
            TRITON.select_diverse_anchors(features, count=41, keep=40)
        assert launched == ["_scales", "_totals", "_spread_out_without_table"]
        assert len(operations.names) <= 12, operations.names


@pytest.mark.parametrize("algorithms", [TRITON, TORCH])
@pytest.mark.parametrize("config", [MASS, ATTENTION, CALIBRATED, COVERAGE, AOTConfig(mass=0.2, nearest_weight=0.1)])
@pytest.mark.parametrize("retention", [0.1, 0.25, 0.333])
def test_nothing_waits_on_the_first_video_of_a_size(retention, config, algorithms):
    for grid, width in (VideoGrid(32, 14, 14), 64), (VideoGrid(7, 5, 3), 8), (VideoGrid(1, 9, 9), 8):
        with Waits() as waits:
            reduce(grid, width, retention=retention, config=config, algorithms=algorithms)
        assert not waits.found
        assert not waits.copies


def test_a_choice_without_a_table_waits_for_nothing():
    with Waits() as waits:
        reduce(VideoGrid(3, 1, 4097), 8, retention=0.1)
    assert not waits.found
    assert not waits.copies


def test_where_frames_exchange_tokens_the_layout_of_clips_is_one_copy_that_does_not_wait():
    with Waits() as waits:
        reduce(VideoGrid(29, 6, 6), 16, retention=0.2, config=AOTConfig(kappa=0.3))
    assert not waits.found
    assert waits.copies <= 2


def test_the_recorder_of_waits_notices_every_kind_of_wait():
    meta = torch.empty(3, device="meta")
    for waiting in (
        lambda: torch.tensor([1], device="meta"),
        lambda: torch.as_tensor([1], device="meta"),
        lambda: torch.zeros(3).tolist(),
        lambda: torch.zeros(1).item(),
        lambda: torch.zeros(3).nonzero(),
        lambda: torch.zeros(3).to(torch.device("meta")),
        lambda: meta[[0, 1]],
    ):
        with Waits() as waits:
            waiting()
        assert waits.found


@pytest.mark.parametrize(("algorithms", "retention"), [(TRITON, 0.1), (TRITON, 0.25), (TORCH, 0.1)])
def test_a_frame_of_12288_positions_needs_no_table_of_positions(algorithms, retention):
    """A table of 12,288 x 12,288 distances is 604 MB. All that is left is linear in the positions.

    Four tables of positions x anchors, and float32 copies of the features and of the anchors. (A kernel's table is read
    and written in place.)
    """
    grid, width = VideoGrid(1, 96, 128), 512
    with Operations() as operations:
        reduced = reduce(grid, width, retention=retention, algorithms=algorithms)
    positions, anchors = grid.positions, reduced.budget.anchors
    assert operations.most_bytes <= 4 * (4 * positions * anchors + 4 * positions * width)


def test_a_video_of_many_positions_needs_no_more_for_its_choice_than_a_block_of_products():
    grid, width = VideoGrid(24, 27, 27), 256
    features = torch.empty(grid.frames, grid.positions, width, device="meta", dtype=torch.bfloat16)
    with Operations() as operations:
        TRITON.select_diverse_anchors(features, count=73, keep=70)
    assert operations.most_bytes <= 256 * 2**20 + 2**20
