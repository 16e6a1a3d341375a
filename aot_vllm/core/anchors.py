"""The choice of a frame's anchors: by attention ("token anchors", section 3.2 of the paper), or by diversity.

Dimensions: T frames, P positions of a frame, A anchors of a frame, k anchors kept of a frame, D width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aot_vllm.config import check_integer, check_real
from aot_vllm.core.layout import check_keep
from aot_vllm.errors import SettingError, ShapeError

TABLE_BYTES = 64 * 2**20
"""Most memory for tables of positions x positions. A frame of more than 4,096 positions gets no table. Its distances
are computed from one token at a time, when they are needed."""


def select_anchors(
    local_scores: Tensor,
    global_scores: Tensor,
    *,
    rows: int,
    cols: int,
    count: int,
    global_ratio: float = 0.5,
    window: int = 9,
) -> Tensor:
    """Return exactly `count` distinct positions of every frame, ascending: (T, P), (T, P) -> (T, count).

    Local anchors come first: the `floor(count * (1 - global_ratio) / windows)` tokens of each window with the highest
    local score. A window with fewer cells than its share gives all its cells. Global anchors fill up the count: the
    remaining tokens with the highest global score.

    If `window` does not divide a side, the side is cut into ceil(side / window) windows whose lengths differ by at most
    1. Every window then gives about as many anchors per cell as its neighbours. Ties go to the lower position, on every
    device and for every batch. A NaN ranks lowest, like negative infinity.

    Raises `ShapeError` for scores that do not fit the grid, `SettingError` for a count outside [1, P]. Section 3.2.
    """
    positions = rows * cols
    if local_scores.dim() != 2 or local_scores.shape[1] != positions:
        raise ShapeError(f"local_scores must have shape (frames, {positions}), got {tuple(local_scores.shape)}")
    if global_scores.shape != local_scores.shape:
        expected, got = tuple(local_scores.shape), tuple(global_scores.shape)
        raise ShapeError(f"global_scores must have shape {expected}, got {got}")
    _check_count(count, positions)
    check_real("global_ratio", global_ratio, high=1.0)
    check_integer("window", window, minimum=1)

    is_local_TP = _best_of_each_window(
        local_scores, rows=rows, cols=cols, window=window, local_count=count * (1 - global_ratio)
    )
    # In one ranking the local anchors come first, so the global anchors fill up the count without a second selection.
    priority_TP = _finite(global_scores).masked_fill(is_local_TP, torch.inf)
    order_TP = priority_TP.argsort(dim=1, descending=True, stable=True)
    return order_TP[:, :count].sort(dim=1).values


def select_diverse_anchors(features: Tensor, *, count: int, keep: int | Sequence[int] | None = None) -> Tensor:
    """Return `count` distinct positions of every frame, in the order of their choice: (T, P, D) -> (T, count).

    Greedy k-center by Euclidean distance (Gonzalez, "Clustering to minimize the maximum intercluster distance", 1985):
    each choice is the token farthest from all earlier choices. So repeated content is chosen once, and a rare token is
    chosen however small its object is.

    The first frame starts with the token farthest from the rest of the frame. Every later frame also stays away from
    the tokens that the previous frame keeps, so consecutive frames contribute different content. A frame keeps the
    first `keep` of its choices: one count for all frames or one count for each, by default all choices.

    A NaN does not change the number of choices. Entries must be below 1e18 / sqrt(D), where squares overflow. Raises
    `ShapeError` for features that are not (T, P, D), `SettingError` for counts that do not fit them.
    """
    keep_per_frame = check_diverse(features, count=count, keep=keep)
    orders: list[Tensor] = []
    before: tuple[Tensor, Tensor] | None = None
    for frame, kept in zip(_frames(features), keep_per_frame, strict=True):
        far_P = frame.rest if before is None else _far_from(*before, frame)
        order_A = _spread_out(frame, far_P, count=count, starts_afresh=before is None)
        kept_k = order_A[:kept]
        before = (frame.tokens.index_select(0, kept_k), frame.squares.index_select(0, kept_k)) if kept else None
        orders.append(order_A)
    return torch.stack(orders)


def check_diverse(features: Tensor, *, count: int, keep: int | Sequence[int] | None) -> tuple[int, ...]:
    """Return one count of kept anchors for each frame. Raises for the first argument that does not fit the others."""
    if features.dim() != 3 or 0 in features.shape:
        raise ShapeError(
            f"features must have shape (frames, positions, width), all at least 1, got {tuple(features.shape)}"
        )
    frames, positions, _ = features.shape
    _check_count(count, positions)
    return check_keep(count if keep is None else keep, frames=frames, anchors=count)


@dataclass(frozen=True)
class _Frame:
    """Tokens (P, D) in float32, the squares of their lengths (P,), and their squared distances from each other, (P, P).

    `distances` is None if that table would be too large. A token's distance from itself is negative infinity there.
    `rest` (P,) is the sum of the distances from each token to all others, up to a summand that all have in common.
    """

    tokens: Tensor
    squares: Tensor
    rest: Tensor
    distances: Tensor | None


def _frames(features_TPD: Tensor) -> Iterator[_Frame]:
    """Yield every frame. Tables and float32 copies are made for one frame after the other."""
    positions = features_TPD.shape[1]
    if 4 * positions**2 > TABLE_BYTES:
        for frame_PD in features_TPD:
            tokens_PD = frame_PD.float()
            squares_P = torch.linalg.vector_norm(tokens_PD, dim=1).square_()
            rest_P = positions * squares_P - 2 * (tokens_PD @ tokens_PD.sum(dim=0))
            yield _Frame(tokens_PD, squares_P, rest_P, None)
        return
    for block_TPD in features_TPD.split(1):  # more at a time would need more memory than vLLM has profiled
        tokens_TPD = block_TPD.float()
        distances_TPP = _products(tokens_TPD)
        squares_TP = distances_TPP.diagonal(dim1=1, dim2=2).clone()
        distances_TPP.mul_(-2).add_(squares_TP.unsqueeze(2)).add_(squares_TP.unsqueeze(1))
        rest_TP = distances_TPP.sum(dim=2)
        distances_TPP.diagonal(dim1=1, dim2=2).fill_(-torch.inf)  # a chosen token is never the farthest again
        yield from map(_Frame, tokens_TPD, squares_TP, rest_TP, distances_TPP)


def _products(tokens_TPD: Tensor) -> Tensor:
    """Return the products of all pairs of tokens of a frame, (T, P, P).

    On a CPU each product of a token of the second half with one of the first is copied from where it was computed the
    other way round. That saves a quarter of the work. On a GPU it would be more launches.
    """
    if tokens_TPD.device.type != "cpu":
        return torch.bmm(tokens_TPD, tokens_TPD.transpose(1, 2))
    half = tokens_TPD.shape[1] // 2
    products_TPP = tokens_TPD.new_empty(*tokens_TPD.shape[:2], tokens_TPD.shape[1])
    products_TPP[:, :half] = torch.bmm(tokens_TPD[:, :half], tokens_TPD.transpose(1, 2))
    products_TPP[:, half:, half:] = torch.bmm(tokens_TPD[:, half:], tokens_TPD[:, half:].transpose(1, 2))
    products_TPP[:, half:, :half] = products_TPP[:, :half, half:].transpose(1, 2)
    return products_TPP


def _far_from(tokens_kD: Tensor, squares_k: Tensor, frame: _Frame) -> Tensor:
    """Return the squared distance from every token of a frame to the nearest of k tokens, (P,). Ignores NaN."""
    nearest_kP = torch.addmm(squares_k.unsqueeze(1), tokens_kD, frame.tokens.T, alpha=-2)
    return nearest_kP.nan_to_num_(torch.inf, torch.inf, -torch.inf).amin(dim=0).add_(frame.squares)


def _spread_out(frame: _Frame, far_P: Tensor, *, count: int, starts_afresh: bool) -> Tensor:
    """Return the positions of `count` tokens, each farthest from the tokens before it, (count,).

    `far_P` ranks the tokens for the first choice. It also counts for later choices, unless the frame `starts_afresh`.
    """
    chosen: list[Tensor] = []
    for _ in range(count):
        best_1 = far_P.argmax(dim=0, keepdim=True)
        row_P = _distances_from(frame, best_1)
        far_P = row_P if starts_afresh and not chosen else torch.fmin(far_P, row_P)  # fmin drops NaN
        chosen.append(best_1)
    return torch.cat(chosen)


def _distances_from(frame: _Frame, position_1: Tensor) -> Tensor:
    """Return the squared distances from one token to all others, (P,), and negative infinity for the token itself."""
    if frame.distances is not None:
        return frame.distances.index_select(0, position_1)[0]
    products_P = frame.tokens @ frame.tokens.index_select(0, position_1)[0]
    row_P = products_P.mul_(-2).add_(frame.squares.index_select(0, position_1)).add_(frame.squares)
    return row_P.index_fill_(0, position_1, -torch.inf)


def _check_count(count: int, positions: int) -> None:
    """Raise `SettingError` for a number of anchors outside [1, positions]."""
    if check_integer("count", count, minimum=1) > positions:
        raise SettingError(f"count must be at most {positions}, the positions of a frame, got {count}")


def _best_of_each_window(scores_TP: Tensor, *, rows: int, cols: int, window: int, local_count: float) -> Tensor:
    """Return a (T, P) mask of the best tokens of each window: `local_count` divided by the windows, rounded down."""
    device = scores_TP.device
    row_windows, col_windows = -(-rows // window), -(-cols // window)
    window_P = _runs(rows, row_windows, device).mul_(col_windows).unsqueeze(1).add(_runs(cols, col_windows, device))
    share = int(local_count // (row_windows * col_windows))
    # Sort by score, then by window: both sorts are stable. The rank within a window is the distance to its start.
    best_TP = _finite(scores_TP).argsort(dim=1, descending=True, stable=True)
    sorted_TP, place_TP = window_P.flatten()[best_TP].sort(dim=1, stable=True)
    rank_P = torch.arange(rows * cols, device=device) - torch.searchsorted(sorted_TP[0], sorted_TP[0])
    chosen_TP = (rank_P < share).expand_as(best_TP)
    return torch.zeros_like(chosen_TP).scatter_(1, best_TP.gather(1, place_TP), chosen_TP)


def _runs(side: int, runs: int, device: torch.device) -> Tensor:
    """Return the run of each cell of a side, (side,), if it is cut into runs whose lengths differ by at most 1.

    Run i starts at cell floor(i * side / runs).
    """
    return torch.arange(runs - 1, side * runs, runs, device=device).div_(side, rounding_mode="floor")


def _finite(scores_TP: Tensor) -> Tensor:
    """Return the scores in float32 without NaN and infinities, which the ranking uses for its own marks."""
    limit = torch.finfo(torch.float32).max
    return scores_TP.float().nan_to_num(nan=-limit, posinf=limit, neginf=-limit)
