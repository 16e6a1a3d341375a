"""The choice of a frame's anchors: by attention ("token anchors", section 3.2 of the paper), or far from each other.

Dimensions: T frames, P positions of a frame, A anchors of a frame, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from aot_vllm.config import Distance, Memory, check_integer, check_real
from aot_vllm.core.distances import Frame, distances_from, frames_of
from aot_vllm.core.layout import check_keep
from aot_vllm.core.memory import Remembered, walk
from aot_vllm.errors import SettingError, ShapeError


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


def select_diverse_anchors(
    features: Tensor,
    *,
    count: int,
    keep: int | Sequence[int] | None = None,
    weights: Tensor | None = None,
    distance: Distance = "euclidean",
    memory: Memory = "previous",
) -> Tensor:
    """Return `count` distinct positions of every frame, in the order of their choice: (T, P, D) -> (T, count).

    Greedy k-center (Gonzalez, "Clustering to minimize the maximum intercluster distance", 1985): each choice is the
    token farthest from all earlier choices. So repeated content is chosen once, and a rare token is chosen however
    small its object is.

    The first frame starts with the token farthest from the rest of the frame. Every later frame also stays away from
    tokens that earlier frames keep, so frames contribute different content; `memory` says from which. A frame keeps
    the first `keep` of its choices: one count for all frames or one count for each, by default all choices.

    `weights` (T, P), above 0: a token's squared distances count that many times as much. `distance`: see
    `aot_vllm.core.distances`.

    A NaN does not change the number of choices. Entries must be below 1e18 / sqrt(D), where squares overflow. Raises
    `ShapeError` for features that are not (T, P, D) and weights that are not (T, P), `SettingError` for counts that do
    not fit them.
    """
    keep_per_frame = check_choice(features, count=count, keep=keep, weights=weights)
    frames = frames_of(features, distance)

    def choose(index: int, frame: Frame, near_P: Tensor | None) -> Tensor:
        return _spread_out(frame, near_P, None if weights is None else weights[index].float(), count=count)

    return walk(frames, keep_per_frame, choose, Remembered.by(memory))


def check_choice(
    features: Tensor, *, count: int, keep: int | Sequence[int] | None, weights: Tensor | None = None
) -> tuple[int, ...]:
    """Return one count of kept anchors for each frame. Raises for the first argument that does not fit the others."""
    if features.dim() != 3 or 0 in features.shape:
        raise ShapeError(
            f"features must have shape (frames, positions, width), all at least 1, got {tuple(features.shape)}"
        )
    frames, positions, _ = features.shape
    if weights is not None and weights.shape != (frames, positions):
        raise ShapeError(f"weights must have shape {(frames, positions)}, got {tuple(weights.shape)}")
    _check_count(count, positions)
    return check_keep(count if keep is None else keep, frames=frames, anchors=count)


def _spread_out(frame: Frame, near_P: Tensor | None, weights_P: Tensor | None, *, count: int) -> Tensor:
    """Return the positions of `count` tokens, each farthest from the tokens before it, (count,).

    `near_P`: squared distances to the nearest remembered token, or None if there is none.
    """
    far_P = near_P
    chosen: list[Tensor] = []
    for _ in range(count):
        ranked_P = frame.rest if far_P is None else far_P
        best_1 = (ranked_P if weights_P is None else ranked_P * weights_P).argmax(dim=0, keepdim=True)
        row_P = distances_from(frame, best_1)
        far_P = row_P if far_P is None else torch.fmin(far_P, row_P)  # fmin drops NaN
        chosen.append(best_1)
    return torch.cat(chosen)


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
