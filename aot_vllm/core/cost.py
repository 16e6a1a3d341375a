"""The cost of moving a token onto an anchor, for both phases (sections 3.2 and 3.3 of the paper).

Dimensions: B problems, T frames, P positions of a frame, M tokens, N anchors, A anchors of a frame, D width.
"""

import math

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


def spatial_distance(anchors_TA: Tensor, *, rows: int, cols: int) -> Tensor:
    """Return the distance on the unit square from every position to every anchor, (T, P, A), in [0, sqrt(2)]."""
    ys, xs = (torch.linspace(0, 1, n, dtype=torch.float32, device=anchors_TA.device) for n in (rows, cols))
    places_P2 = torch.cartesian_prod(ys, xs).view(rows * cols, 2)
    anchors_TA2 = places_P2.index_select(0, anchors_TA.flatten()).view(*anchors_TA.shape, 2)
    # Computed from differences. The alternative, by products, would lose half of the digits.
    return torch.cdist(anchors_TA2, places_P2, compute_mode="donot_use_mm_for_euclid_dist").transpose(1, 2)


def temporal_discount(frames_apart: int, *, sigma: float) -> float:
    """Return the factor, in (0, 1), on the cost between a key frame and a later frame: nearer frames cost less."""
    return 1 - math.exp(-(frames_apart**2) / (2 * sigma**2))
