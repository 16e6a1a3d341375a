"""The cost of moving a token onto an anchor, for both phases (sections 3.2 and 3.3 of the paper).

Dimensions: B problems, T frames, P positions of a frame, M tokens, N anchors, A anchors of a frame, D width.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

# Shorter vectors count as this long. A zero vector then has cosine 0 to every other.
SHORTEST = 1e-12


def norms(features_BMD: Tensor) -> Tensor:
    """Return the Euclidean length of every feature, (B, M), at least `SHORTEST`, in float32."""
    return torch.linalg.vector_norm(features_BMD, dim=-1, dtype=torch.float32).clamp_min_(SHORTEST)


def cosine(tokens_BMD: Tensor, anchors_BND: Tensor, token_norms_BM: Tensor, anchor_norms_BN: Tensor) -> Tensor:
    """Return cosine similarities in [-1, 1], (B, M, N).

    The products are divided by the norms. Normalised copies of all features would cost more than the products.
    """
    product_BMN = torch.bmm(anchors_BND, tokens_BMD.transpose(1, 2)).transpose(1, 2)
    return product_BMN.div_(token_norms_BM.unsqueeze(2)).div_(anchor_norms_BN.unsqueeze(1))


def squared_distances(x_MD: Tensor, y_ND: Tensor) -> Tensor:
    """Return squared Euclidean distances, (M, N), of float32 features. Rounding may move a distance of 0 off 0."""
    x_squares_M, y_squares_N = x_MD.square().sum(dim=1), y_ND.square().sum(dim=1)
    return torch.addmm(x_squares_M.unsqueeze(1), x_MD, y_ND.T, alpha=-2).add_(y_squares_N)


def spatial_distance(anchors_TA: Tensor, *, rows: int, cols: int) -> Tensor:
    """Return the distance on the unit square from every position to every anchor, (T, P, A), in [0, sqrt(2)]."""
    distances_PP = _distances(rows, cols, anchors_TA.device)
    return distances_PP.index_select(0, anchors_TA.flatten()).unflatten(0, anchors_TA.shape).transpose(1, 2)


@lru_cache(maxsize=16)
def _distances(rows: int, cols: int, device: torch.device) -> Tensor:
    """Return the distances between all positions, (P, P), with the grid stretched over the unit square."""
    ys, xs = (torch.linspace(0, 1, n, dtype=torch.float32, device=device) for n in (rows, cols))
    places_P2 = torch.cartesian_prod(ys, xs)
    return (places_P2.unsqueeze(1) - places_P2).norm(dim=2)


def temporal_discount(frames_apart: int, *, sigma: float) -> float:
    """Return the factor, in (0, 1), on the cost between a key frame and a later frame: nearer frames cost less."""
    return 1 - math.exp(-(frames_apart**2) / (2 * sigma**2))
