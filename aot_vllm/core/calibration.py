"""How much the distances of a token count, in the choice of anchors: by attention received, and by relevance.

FlashVID (2026) multiplies the distances of greedy max-min by both. What a position receives in all frames says nothing
of their content: vision towers make such sinks (SToP, 2026). So it is taken out.

Dimensions: T frames, P positions of a frame, D width.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from aot_vllm.core.cost import SHORTEST, norms
from aot_vllm.errors import ShapeError

LEAST = 1e-3
"""Least factor. A token without attention, or unlike its segment, can still be chosen: among such, distances decide."""

MOST = 1e20
"""Largest score. Larger ones and infinities count as this."""

SIMILAR = 0.9
"""Neighbouring frames are of one segment if the means of their tokens have at least this cosine, as in FastVID."""


def token_weights(
    features: Tensor,
    scores: Tensor | None,
    *,
    by_attention: bool = True,
    without_sinks: bool = True,
    by_relevance: bool = True,
) -> Tensor | None:
    """Return the product of the factors that are switched on: (T, P, D), (T, P) -> (T, P), or None without any.

    `by_attention`: attention received; `without_sinks` takes out what persists over frames. `by_relevance`: similarity
    to the mean of the segment. Each factor is at least `LEAST`. Raises `ShapeError` if scores are needed and missing.
    """
    factors = []
    if by_attention:
        if scores is None:
            raise ShapeError("scores must be a tensor if distances are weighted by attention, got None")
        factors.append(attention_weights(scores, without_sinks=without_sinks))
    if by_relevance:
        factors.append(relevance(features))
    return None if not factors else factors[0] if len(factors) == 1 else factors[0] * factors[1]


def attention_weights(scores: Tensor, *, without_sinks: bool = True) -> Tensor:
    """Return the attention that each token receives, in medians of its frame: (T, P) -> (T, P), float32.

    `without_sinks` divides it by what the position receives in the other frames, on average, where that is above 1. So
    a position that receives much in every frame counts as an ordinary one, and one that receives much in a few frames
    counts more there. A NaN counts as 0.
    """
    clean_TP = scores.float().nan_to_num(0.0, MOST, 0.0).clamp_(0.0, MOST)
    weights_TP = clean_TP / clean_TP.median(dim=1, keepdim=True).values.clamp_min_(SHORTEST)
    if without_sinks:
        others_TP = (weights_TP.sum(dim=0) - weights_TP).div_(max(1, len(weights_TP) - 1))
        weights_TP = weights_TP / others_TP.clamp_min_(1)
    return weights_TP.clamp_min(LEAST)


def relevance(features: Tensor) -> Tensor:
    """Return the cosine of each token and the mean of its segment, at least `LEAST`: (T, P, D) -> (T, P), float32.

    Tokens are averaged by direction, so that those of extreme length do not decide. A segment is a run of frames whose
    means resemble the mean of the frame before (`SIMILAR`).
    """
    scales_TP = norms(features).reciprocal_()
    means_TD = torch.stack(
        [scales_P @ frame_PD.float() for scales_P, frame_PD in zip(scales_TP, features, strict=True)]
    )
    directions_TD = means_TD / norms(means_TD).unsqueeze(1)
    is_cut_t = (directions_TD[1:] * directions_TD[:-1]).sum(dim=1) < SIMILAR
    segment_T = pad(is_cut_t.cumsum(dim=0), (1, 0))
    of_segment_TT = (segment_T.unsqueeze(1) == segment_T).float()
    segments_TD = of_segment_TT @ means_TD
    segments_TD = segments_TD / norms(segments_TD).unsqueeze(1)
    cosines = [frame_PD.float() @ mean_D for frame_PD, mean_D in zip(features, segments_TD, strict=True)]
    return torch.stack(cosines).mul_(scales_TP).nan_to_num_(LEAST).clamp_min_(LEAST)
