"""Greedy facility location in one launch is that of `core`: the same tokens in the same order."""

import pytest
import torch

from aot_vllm import VideoGrid
from aot_vllm.core import coverage
from tests.strategies import noise, video


def both(kernels, device, features, **arguments):
    chosen = kernels.select_covering_anchors(features.to(device), **arguments)
    return chosen.cpu(), coverage.select_covering_anchors(features, **arguments)


@pytest.mark.parametrize("memory", ["previous", "carried"])
@pytest.mark.parametrize(
    ("frames", "positions", "width", "count"), [(1, 1, 4, 1), (3, 1, 4, 1), (4, 5, 4, 2), (4, 33, 16, 6)]
)
def test_the_choice_is_that_of_core(kernels, device, frames, positions, width, count, memory):
    features = video(positions, VideoGrid(frames, positions, 1), width)[0]
    keep = [count - frame % 2 for frame in range(frames)]
    chosen, expected = both(kernels, device, features, count=count, keep=keep, memory=memory)
    assert torch.equal(chosen, expected)


def test_half_precision_lengths_and_strides_are_read_as_they_lie(kernels, device):
    features = video(8, VideoGrid(3, 4, 5), 16)[0].half()
    features[:, 3] *= 30
    strided = features.transpose(0, 1).contiguous().transpose(0, 1)
    chosen, expected = both(kernels, device, strided[:, :, ::2], count=4, distance="euclidean")
    assert torch.equal(chosen, expected)


def test_after_frames_that_keep_nothing_the_next_frame_starts_afresh(kernels, device):
    features = video(5, VideoGrid(4, 5, 4), 8)[0]
    for memory in ("previous", "carried", "all"):
        chosen, expected = both(kernels, device, features, count=3, keep=[0, 2, 0, 1], memory=memory)
        assert torch.equal(chosen, expected)


def test_blocks_of_frames_change_nothing(kernels, device, monkeypatch):
    from aot_vllm.kernels import coverage as kernel

    features = video(7, VideoGrid(5, 4, 4), 8)[0].to(device)
    for memory in ("previous", "carried"):
        whole = kernels.select_covering_anchors(features, count=3, keep=2, memory=memory)
        with monkeypatch.context() as patch:
            patch.setattr(kernel, "MOST_BLOCKS", 5)
            for frames_at_once in (1, 2):
                patch.setattr(kernel, "BLOCK_BYTES", frames_at_once * 8 * 16**2)
                blocks = kernels.select_covering_anchors(features, count=3, keep=2, memory=memory)
                assert torch.equal(blocks, whole)


def test_a_large_frame_is_covered_by_evenly_spaced_candidates(kernels, device, monkeypatch):
    monkeypatch.setattr(coverage, "ALL_CANDIDATES", 8)
    chosen, expected = both(kernels, device, noise(6, 3, 21, 8), count=4)
    assert torch.equal(chosen, expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, which computes with NumPy
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
def test_a_nan_does_not_change_the_count(kernels, device, value):
    features = noise(6, 3, 16, 8)
    features[1, 7, 2] = value
    features[2] = value
    chosen, expected = both(kernels, device, features, count=9)
    assert (chosen.sort(dim=1).values.diff(dim=1) > 0).all()
    assert torch.equal(chosen[0], expected[0])
