"""How much the distances of a token count: by attention received, and by relevance."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aot_vllm.core.calibration import attention_weights, relevance, token_weights
from aot_vllm.errors import ShapeError
from tests import reference
from tests.strategies import many, noise, seeds


@many
@given(frames=st.integers(1, 7), positions=st.integers(1, 20), seed=seeds, without_sinks=st.booleans())
def test_attention_counts_as_in_the_oracle(frames, positions, seed, without_sinks):
    scores = noise(seed, frames, positions).exp()
    scores[:, 0] *= 50
    weights = attention_weights(scores, without_sinks=without_sinks)
    expected = reference.attention_weights(scores.tolist(), without_sinks)
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=1e-4, atol=1e-6)


@many
@given(frames=st.integers(1, 7), positions=st.integers(1, 20), seed=seeds, change=st.sampled_from([0.0, 0.1, 1.0]))
def test_relevance_is_that_of_the_oracle(frames, positions, seed, change):
    features = noise(seed, frames // 3 + 1, positions, 8).repeat_interleave(3, dim=0)[:frames]
    features = features + change * noise(seed + 1, frames, positions, 8)
    expected = torch.tensor(reference.relevance(features.tolist()))
    torch.testing.assert_close(relevance(features), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("noisy", [False, True])
def test_what_persists_counts_as_ordinary(noisy):
    scores = noise(1, 40, 50).mul(0.5 if noisy else 0).exp()
    scores[:, 7] *= 50
    weights = attention_weights(scores)
    assert 0.8 < weights[:, 7].mean() / weights[:, 8:].mean() < 1.25
    assert attention_weights(scores, without_sinks=False)[:, 7].min() > 10


def test_what_is_attended_in_one_frame_counts_there():
    scores = torch.ones(8, 30)
    scores[3, 5] = 20
    weights = attention_weights(scores)
    assert weights[3, 5] == 20
    assert weights[2, 5] == pytest.approx(7 / 26)  # 1 of (20 + 6) / 7 in the other frames
    alone = attention_weights(scores[3:4])
    assert alone[0, 5] == 20


def test_a_segment_ends_where_the_content_changes():
    """The mean of a segment is that of its own frames. A token of the next scene is no part of it."""
    one, two = torch.eye(4)[0], torch.eye(4)[1]
    frames = torch.stack([one.repeat(6, 1)] * 3 + [two.repeat(6, 1)] * 2)
    frames[1, 2] = two
    weights = relevance(frames)
    assert weights[1, 2] == pytest.approx(1 / (17**2 + 1) ** 0.5)
    assert weights[0, 0] == pytest.approx(17 / (17**2 + 1) ** 0.5)
    assert (weights[3:] == 1).all()


def test_scaling_scores_or_tokens_changes_nothing():
    scores, features = noise(2, 4, 20).exp(), noise(3, 4, 20, 8)
    torch.testing.assert_close(attention_weights(scores * 1e4), attention_weights(scores))
    lengths = noise(4, 4, 20, 1).exp()
    torch.testing.assert_close(relevance(features * lengths), relevance(features), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 0.0, -1.0, 65504.0])
def test_weights_are_finite_and_above_0_whatever_the_scores(value):
    scores = noise(5, 3, 12).exp()
    scores[0], scores[1, 4], scores[2, :7] = value, value, value
    for without_sinks in (True, False):
        weights = attention_weights(scores, without_sinks=without_sinks)
        assert weights.isfinite().all()
        assert (weights > 0).all()


def test_zero_vectors_and_nan_get_the_least_weight():
    features = noise(6, 2, 10, 4)
    features[0, 3], features[1, 5] = 0, torch.nan
    weights = relevance(features)
    assert weights.isfinite().all()
    assert weights[0, 3] == weights[1, 5] == pytest.approx(1e-3)


def test_factors_can_be_switched_off():
    features, scores = noise(7, 3, 10, 4), noise(8, 3, 10).exp()
    assert token_weights(features, None, by_attention=False, by_relevance=False) is None
    assert torch.equal(token_weights(features, None, by_attention=False), relevance(features))
    assert torch.equal(token_weights(features, scores, by_relevance=False), attention_weights(scores))
    both = token_weights(features, scores)
    assert torch.equal(both, attention_weights(scores) * relevance(features))
    with pytest.raises(ShapeError, match="scores must be a tensor"):
        token_weights(features, None)
