"""Weights of tokens, and what tokens are multiplied by, are those of `core`."""

import pytest
import torch

from aot_vllm.core import calibration, distances
from tests.strategies import noise


def clip(frames, positions, width):
    """A scene that changes after two frames."""
    scenes = noise(1, 3, 1, width).repeat_interleave(2, dim=0)[:frames]
    return scenes + 0.3 * noise(2, frames, positions, width)


@pytest.mark.parametrize(("by_attention", "by_relevance"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("without_sinks", [True, False])
@pytest.mark.parametrize(("frames", "positions", "width"), [(1, 1, 4), (5, 33, 8), (6, 20, 150)])
def test_weights_are_those_of_core(
    kernels, device, frames, positions, width, by_attention, by_relevance, without_sinks
):
    features, scores = clip(frames, positions, width), noise(3, frames, positions).exp()
    scores[:, 0] *= 50
    settings = {"by_attention": by_attention, "by_relevance": by_relevance, "without_sinks": without_sinks}
    made = kernels.token_weights(features.to(device), scores.to(device), **settings)
    expected = calibration.token_weights(features, scores, **settings)
    torch.testing.assert_close(made.cpu(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, which computes with NumPy
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1.0, 0.0])
def test_weights_are_finite_and_above_0_whatever_the_scores(kernels, device, value):
    features, scores = clip(3, 12, 8), noise(5, 3, 12).exp()
    features[0, 3] = value
    scores[0], scores[1, 4], scores[2, :7] = value, value, value
    weights = kernels.token_weights(features.to(device), scores.to(device))
    assert weights.isfinite().all()
    assert (weights > 0).all()


def test_without_factors_there_are_no_weights(kernels, device):
    assert kernels.token_weights(noise(1, 2, 5, 4), None, by_attention=False, by_relevance=False) is None


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("positions", [1, 2, 15, 64])
def test_scales_are_those_of_core(kernels, device, distance, positions):
    from aot_vllm.kernels.lengths import scales_and_squares

    features = noise(4, 3, positions, 8)
    features[:, ::9] *= 30
    features[1, : positions // 2] = 0
    scales, squares = scales_and_squares(features.to(device), distance)
    expected = distances.length_scales(features.norm(dim=2), distance)
    torch.testing.assert_close(scales.cpu(), expected)
    torch.testing.assert_close(squares.cpu(), (features * expected.unsqueeze(2)).square().sum(2))
