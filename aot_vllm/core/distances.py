"""Squared distances between the tokens of a frame, as the greedy choices of anchors measure them.

`euclidean` is the plain distance, but a token of extreme length counts as long as an ordinary one. `cosine` is the
distance of directions: its square is 2 - 2 cos. Either is the Euclidean distance of tokens times a scale of their own.

Dimensions: T frames, P positions of a frame, k tokens, D width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from aot_vllm.config import Distance
from aot_vllm.core.cost import SHORTEST

TABLE_BYTES = 64 * 2**20
"""Most memory for tables of positions x positions. A frame of more than 4,096 positions gets no table. Its distances
are computed from one token at a time, when they are needed."""

EXTREME = 4.0
"""A token more than so many times as long as the median of its frame has an extreme length. Some vision towers make a
few such tokens, which say nothing about their place (Darcet et al., "Vision Transformers Need Registers", 2024). By
plain distance they would be chosen first."""


@dataclass(frozen=True)
class Frame:
    """Tokens (P, D) in float32, and their scales (P,).

    Of the scaled tokens: the squares of their lengths (P,), and their squared distances from each other, (P, P), or
    None if that table would be too large. A token's distance from itself is negative infinity there. `rest` (P,) is the
    sum of the distances from each token to all others.
    """

    tokens: Tensor
    scales: Tensor
    squares: Tensor
    rest: Tensor
    distances: Tensor | None

    def scaled(self, positions_k: Tensor) -> tuple[Tensor, Tensor]:
        """Return some scaled tokens, (k, D), and the squares of their lengths, (k,)."""
        scales_k1 = self.scales.index_select(0, positions_k).unsqueeze(1)
        return self.tokens.index_select(0, positions_k) * scales_k1, self.squares.index_select(0, positions_k)


def length_scales(norms: Tensor, distance: Distance) -> Tensor:
    """Return what each token is multiplied by before distances are measured, (..., P), from lengths (..., P).

    `cosine`: what makes its length 1. `euclidean`: 1, or what makes it as long as the median of its frame, for tokens
    of extreme length. Zero vectors and NaN don't count for the median.
    """
    if distance == "cosine":
        return norms.clamp_min(SHORTEST).reciprocal_()
    median = norms.masked_fill(norms == 0, torch.nan).nanmedian(dim=-1, keepdim=True).values
    return torch.where(norms > EXTREME * median, median / norms, 1)


def frames_of(features_TPD: Tensor, distance: Distance) -> Iterator[Frame]:
    """Yield every frame. Tables and float32 copies are made for one frame after the other."""
    positions = features_TPD.shape[1]
    with_table = 4 * positions**2 <= TABLE_BYTES
    for frame_PD in features_TPD:
        tokens_PD = frame_PD.float()
        products_PP = _products(tokens_PD) if with_table else None
        if products_PP is None:
            squares_P = torch.linalg.vector_norm(tokens_PD, dim=1).square_()
        else:
            squares_P = products_PP.diagonal().clone()
        scales_P = length_scales(squares_P.sqrt(), distance)
        squares_P.mul_(scales_P).mul_(scales_P)
        if products_PP is None:
            sums_P = (tokens_PD @ (scales_P @ tokens_PD)).mul_(scales_P)
            rest_P = sums_P.mul_(-2).add_(squares_P, alpha=positions).add_(squares_P.sum())
            yield Frame(tokens_PD, scales_P, squares_P, rest_P, None)
            continue
        distances_PP = products_PP.mul_(scales_P.unsqueeze(1)).mul_(scales_P).mul_(-2)
        distances_PP.add_(squares_P.unsqueeze(1)).add_(squares_P)
        rest_P = distances_PP.sum(dim=1)
        distances_PP.diagonal().fill_(-torch.inf)  # a chosen token is never the farthest again
        yield Frame(tokens_PD, scales_P, squares_P, rest_P, distances_PP)


def _products(tokens_PD: Tensor) -> Tensor:
    """Return the products of all pairs of tokens of a frame, (P, P).

    On a CPU each product of a token of the second half with one of the first is copied from where it was computed the
    other way round. That saves a quarter of the work. On a GPU it would be more launches.
    """
    if tokens_PD.device.type != "cpu":
        return tokens_PD @ tokens_PD.T
    half = tokens_PD.shape[0] // 2
    products_PP = tokens_PD.new_empty(tokens_PD.shape[0], tokens_PD.shape[0])
    torch.mm(tokens_PD[:half], tokens_PD.T, out=products_PP[:half])
    products_PP[half:, half:] = tokens_PD[half:] @ tokens_PD[half:].T
    products_PP[half:, :half] = products_PP[:half, half:].T
    return products_PP


def distances_from(frame: Frame, position_1: Tensor) -> Tensor:
    """Return the squared distances from one token to all others, (P,), and negative infinity for the token itself."""
    if frame.distances is not None:
        return frame.distances.index_select(0, position_1)[0]
    token_1D, square_1 = frame.scaled(position_1)
    row_P = (frame.tokens @ token_1D[0]).mul_(frame.scales).mul_(-2).add_(square_1).add_(frame.squares)
    return row_P.index_fill_(0, position_1, -torch.inf)


def distances_to(tokens_kD: Tensor, squares_k: Tensor, frame: Frame) -> Tensor:
    """Return the squared distances from k scaled tokens to every token of a frame, (k, P). Infinite where NaN."""
    products_kP = (tokens_kD @ frame.tokens.T).mul_(frame.scales).mul_(-2)
    return products_kP.add_(squares_k.unsqueeze(1)).add_(frame.squares).nan_to_num_(torch.inf, torch.inf, -torch.inf)


def nearest_of(tokens_kD: Tensor, squares_k: Tensor, frame: Frame) -> Tensor:
    """Return the squared distance from every token of a frame to the nearest of k scaled tokens, (P,). Ignores NaN."""
    return distances_to(tokens_kD, squares_k, frame).amin(dim=0)
