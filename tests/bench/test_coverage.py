"""What `bench/coverage.py` measures of a reduced video."""

import pytest
import torch

from aot_vllm import VideoGrid

coverage = pytest.importorskip("bench.coverage")
GRID = VideoGrid(3, 2, 2)


def reduced(features, places):
    from bench.arms import chosen

    return chosen(features, torch.tensor(places), GRID, len(places) / GRID.tokens)


def test_a_whole_video_is_covered_without_gaps_or_error():
    features = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    covered, mean, largest, quantisation, kept = coverage.measures(features, reduced(features, range(12)))
    assert (covered, kept) == (1, 1)
    assert (mean, largest, quantisation) == pytest.approx((0, 0, 0), abs=1e-5)


def test_each_number_is_what_its_name_says():
    """Two directions, each at two places of a frame. One token changes to the other direction in the last frame."""
    one, two = torch.eye(2)
    features = torch.stack([torch.stack([one, one, two, two])] * 3)
    features[2, 1] = two
    without_two = coverage.measures(features, reduced(features, [0, 4, 8]))
    # 7 of 12 tokens are `two`, at a cosine of 0 to `one`; the mean is (5, 7) / 12
    spread = 5 * ((7 / 12) ** 2 * 2) + 7 * ((5 / 12) ** 2 * 2)
    assert without_two == pytest.approx([5 / 12, 7 / 12, 1, 14 / spread, 0], abs=1e-5)
    with_change = coverage.measures(features, reduced(features, [0, 4, 9]))
    assert with_change == pytest.approx([1, 0, 0, 0, 1], abs=1e-5)


def test_every_preset_and_every_selection_is_an_arm():
    from aot_vllm.presets import PRESETS

    names = " ".join(coverage.arms())
    assert all(name in names for name in PRESETS)
