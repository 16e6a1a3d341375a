"""Greedy k-center in one launch is that of `core`: the same tokens in the same order."""

import pytest
import torch

from aot_vllm import VideoGrid
from aot_vllm.core import anchors
from tests.strategies import noise, video


def both(kernels, device, features, **arguments):
    chosen = kernels.select_diverse_anchors(features.to(device), **arguments)
    return chosen.cpu(), anchors.select_diverse_anchors(features, **arguments)


@pytest.mark.parametrize(
    ("frames", "positions", "width", "count"),
    [(1, 1, 4, 1), (3, 1, 4, 1), (4, 3, 2, 3), (4, 63, 16, 9), (5, 196, 24, 12), (2, 729, 16, 6), (2, 2000, 8, 3)],
)
def test_the_choice_is_that_of_core(kernels, device, frames, positions, width, count):
    features = video(positions, VideoGrid(frames, positions, 1), width)[0]
    keep = [count - frame % 2 for frame in range(frames)]
    chosen, expected = both(kernels, device, features, count=count, keep=keep)
    assert torch.equal(chosen, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_give_the_choice_of_core(kernels, device, dtype):
    features = video(1, VideoGrid(3, 7, 7), 16)[0].to(dtype)
    chosen, expected = both(kernels, device, features, count=6)
    assert torch.equal(chosen, expected)


def test_ties_go_to_the_lowest_position(kernels, device):
    """Products of small integers are exact, so equal distances are equal bits."""
    features = (noise(3, 4, 40, 3) * 1.5).round()
    features[2] = features[1]
    chosen, expected = both(kernels, device, features, count=11)
    assert torch.equal(chosen, expected)


def test_constant_frames_give_every_position_once(kernels, device):
    chosen, expected = both(kernels, device, torch.ones(3, 20, 4), count=20)
    assert torch.equal(chosen, expected)
    assert (chosen.sort(dim=1).values == torch.arange(20)).all()


def test_after_a_frame_that_keeps_nothing_the_next_frame_starts_afresh(kernels, device):
    features = video(5, VideoGrid(4, 5, 5), 8)[0]
    chosen, expected = both(kernels, device, features, count=4, keep=[2, 0, 4, 1])
    assert torch.equal(chosen, expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, which computes with NumPy
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_nan_changes_neither_the_count_nor_the_choice(kernels, device, value):
    features = noise(6, 3, 30, 8)
    features[1, 7, 2] = value
    chosen, expected = both(kernels, device, features, count=8)
    assert (chosen.sort(dim=1).values.diff(dim=1) > 0).all()
    assert torch.equal(chosen, expected)


def test_blocks_of_frames_change_nothing(kernels, device, monkeypatch):
    from aot_vllm.kernels import anchors as kernel

    features = video(7, VideoGrid(7, 5, 5), 8)[0]
    whole = kernels.select_diverse_anchors(features.to(device), count=5, keep=3)
    monkeypatch.setattr(kernel, "MOST_BLOCKS", 7)
    for frames_at_once in (1, 3):
        monkeypatch.setattr(kernel, "BLOCK_BYTES", frames_at_once * 8 * 25**2)
        blocks = kernels.select_diverse_anchors(features.to(device), count=5, keep=3)
        assert torch.equal(blocks, whole)


@pytest.mark.parametrize(
    ("frames", "positions", "width", "expected"),
    [
        (32, 196, 3584, 873),  # 256 MiB hold so many
        (768, 729, 3584, 256),  # a third of the video: 1.1 of 4.0 GB
        (9, 4096, 3584, 0),  # a third of the video would be more than all its features
        (6, 4096, 3584, 2),
        (1, 4097, 64, 0),  # a table of distances would take more than 64 MiB
    ],
)
def test_tables_take_a_fixed_amount_of_memory_or_what_the_features_take(frames, positions, width, expected):
    from aot_vllm.kernels.anchors import _frames_at_once

    features = torch.empty(frames, positions, width, dtype=torch.bfloat16, device="meta")
    assert _frames_at_once(features) == expected


def test_strided_features_are_read_as_they_lie(kernels, device):
    features = video(8, VideoGrid(3, 4, 5), 16)[0]
    strided = features.transpose(0, 1).contiguous().transpose(0, 1)
    chosen, expected = both(kernels, device, strided[:, :, ::2], count=5)
    assert torch.equal(chosen, expected)


def test_tensors_that_do_not_fit_are_refused_as_by_core(kernels):
    from aot_vllm.errors import SettingError, ShapeError

    with pytest.raises(ShapeError, match="features must have shape"):
        kernels.select_diverse_anchors(torch.ones(3, 4), count=1)
    with pytest.raises(SettingError, match="keep must have 1 counts"):
        kernels.select_diverse_anchors(torch.ones(1, 3, 4), count=1, keep=[1, 1])


@pytest.mark.parametrize("memory", ["previous", "carried", "all"])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_weights_distance_and_memory_have_the_meaning_of_core(kernels, device, distance, memory):
    features, weights = video(9, VideoGrid(5, 5, 6), 16)[0], noise(10, 5, 30).exp()
    features[:, 4] *= 30
    arguments = {"count": 4, "keep": [0, 3, 0, 4, 2], "distance": distance, "memory": memory}
    chosen, expected = both(kernels, device, features, **arguments)
    assert torch.equal(chosen, expected)
    expected = anchors.select_diverse_anchors(features, weights=weights, **arguments)
    chosen = kernels.select_diverse_anchors(features.to(device), weights=weights.to(device), **arguments)
    assert torch.equal(chosen.cpu(), expected)


def test_blocks_of_frames_carry_what_is_remembered(kernels, device, monkeypatch):
    from aot_vllm.kernels import anchors as kernel

    features = video(7, VideoGrid(5, 4, 4), 8)[0].to(device)
    whole = kernels.select_diverse_anchors(features, count=3, keep=2, memory="carried")
    monkeypatch.setattr(kernel, "MOST_BLOCKS", 5)
    monkeypatch.setattr(kernel, "BLOCK_BYTES", 8 * 16**2)
    assert torch.equal(kernels.select_diverse_anchors(features, count=3, keep=2, memory="carried"), whole)
