"""Merging within frames in three launches is that of `core`: equal iterations, and equal tokens up to rounding."""

import dataclasses

import pytest
import torch

from aot_vllm import AOTConfig, VideoGrid, reduce_video
from aot_vllm.core import transport
from tests.strategies import noise, video

PAPER, MASS = AOTConfig.paper(), AOTConfig(mass=0.2)


def draw_anchors(seed, grid, count):
    order = torch.rand(grid.frames, grid.positions, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return order[:, :count].sort(1).values


def check(kernels, device, features, anchors, grid, config, *, compared=None, **tolerance):
    arguments = {"rows": grid.rows, "cols": grid.cols, "config": config, "compared": compared}
    made = kernels.absorb_frames(features.to(device), anchors.to(device), **arguments)
    expected = transport.absorb_frames(features, anchors, **arguments)
    assert made.tokens.dtype == features.dtype
    torch.testing.assert_close(made.tokens.cpu(), expected.tokens, **(tolerance or {"rtol": 1e-5, "atol": 2e-6}))
    assert made.iterations.tolist() == expected.iterations.tolist()
    assert made.converged.tolist() == expected.converged.tolist()
    assert made.converged.dtype == torch.bool


@pytest.mark.parametrize(
    ("frames", "rows", "cols", "count"),
    [(1, 1, 2, 1), (1, 1, 1, 1), (3, 7, 9, 5), (2, 14, 14, 20), (33, 3, 3, 2), (1, 27, 27, 40), (1, 40, 50, 7)],
)
@pytest.mark.parametrize("config", [MASS, PAPER, AOTConfig(mass=0.2, tolerance=0.0, iterations=3)])
def test_the_merged_tokens_are_those_of_core(kernels, device, frames, rows, cols, count, config):
    grid = VideoGrid(frames, rows, cols)
    check(kernels, device, video(2, grid, 24)[0], draw_anchors(2, grid, count), grid, config)


@pytest.mark.parametrize("mass", [0.0, 0.2, 40.0])
@pytest.mark.parametrize("nearest_weight", [0.0, 0.1, 1.0])
def test_mass_and_nearest_weight_have_the_meaning_of_core(kernels, device, mass, nearest_weight):
    grid = VideoGrid(3, 5, 6)
    config = AOTConfig(mass=mass, nearest_weight=nearest_weight)
    check(kernels, device, video(3, grid, 16)[0], draw_anchors(3, grid, 7), grid, config)


@pytest.mark.slow
def test_several_blocks_of_tokens_columns_and_anchors(kernels, device, monkeypatch):
    from aot_vllm.kernels import transport as kernel

    monkeypatch.setattr(kernel, "TILE", 256)
    grid = VideoGrid(2, 9, 10)
    check(kernels, device, video(4, grid, 150)[0], draw_anchors(4, grid, 70), grid, PAPER)


def test_the_plan_is_made_from_the_compared_columns(kernels, device):
    grid = VideoGrid(2, 5, 5)
    features = video(5, grid, 20)[0].transpose(0, 1).contiguous().transpose(0, 1)
    check(kernels, device, features, draw_anchors(5, grid, 6), grid, MASS, compared=8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once_at_the_end(kernels, device, dtype):
    grid = VideoGrid(2, 5, 6)
    features = video(6, grid, 16)[0].to(dtype)
    check(kernels, device, features, draw_anchors(6, grid, 7), grid, PAPER, rtol=torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("epsilon", [1e-3, 1e3])
def test_extreme_epsilons_give_finite_tokens(kernels, device, epsilon):
    grid = VideoGrid(2, 5, 6)
    arguments = {"rows": 5, "cols": 6, "config": AOTConfig(mass=0.2, epsilon=epsilon)}
    anchors = draw_anchors(7, grid, 9).to(device)
    assert kernels.absorb_frames(noise(7, 2, 30, 8).to(device), anchors, **arguments).tokens.isfinite().all()


def test_zero_vectors_and_repeated_tokens(kernels, device):
    grid = VideoGrid(3, 5, 5)
    features = video(8, grid, 16)[0]
    features[:, ::3] = 0
    features[1] = features[1, :1]
    check(kernels, device, features, draw_anchors(8, grid, 6), grid, MASS)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_nan_stays_in_its_frame(kernels, device):
    grid = VideoGrid(3, 5, 5)
    features = video(9, grid, 16)[0]
    features[1, 4] = torch.nan
    made = kernels.absorb_frames(features.to(device), draw_anchors(9, grid, 6).to(device), rows=5, cols=5, config=MASS)
    assert made.tokens[[0, 2]].isfinite().all()


def test_equal_inputs_give_equal_bits(kernels, device):
    grid = VideoGrid(3, 6, 6)
    features, anchors = video(10, grid, 16)[0].to(device), draw_anchors(10, grid, 8).to(device)
    one, two = (kernels.absorb_frames(features, anchors, rows=6, cols=6, config=PAPER).tokens for _ in range(2))
    assert torch.equal(one, two)


@pytest.mark.parametrize(
    "config",
    [AOTConfig(), MASS, AOTConfig(anchors="attention"), PAPER, AOTConfig(emit="both"), AOTConfig.preset("transport")],
)
def test_a_whole_reduction_is_that_of_core(kernels, device, config):
    grid = VideoGrid(9, 6, 7)
    inputs = video(11, grid, 20)
    arguments = {"grid": grid, "retention": 0.23, "config": dataclasses.replace(config, iterations=6)}
    expected = reduce_video(*inputs, **arguments)
    made = reduce_video(*(part.to(device) for part in inputs), **arguments, algorithms=kernels)
    for name in ("frames", "rows", "cols"):
        assert torch.equal(getattr(made, name).cpu(), getattr(expected, name))
    torch.testing.assert_close(made.tokens.cpu(), expected.tokens, rtol=1e-5, atol=2e-6)
