"""The choice of a frame's anchors: by attention ("token anchors", section 3.2 of the paper), or by diversity.

Dimensions: T frames, P positions of a frame, A anchors of a frame, W windows, E cells of a window (padding included), D
width.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from aot_vllm.config import check_integer, check_real
from aot_vllm.core import cost
from aot_vllm.core.layout import check_keep
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
    if features.dim() != 3 or 0 in features.shape:
        raise ShapeError(
            f"features must have shape (frames, positions, width), all at least 1, got {tuple(features.shape)}"
        )
    frames, positions, _ = features.shape
    _check_count(count, positions)
    kept_kD = features[0, :0].float()
    orders = []
    for frame_PD, kept in zip(
        features, check_keep(count if keep is None else keep, frames=frames, anchors=count), strict=True
    ):
        tokens_PD = frame_PD.float()
        order_A = _spread_out(tokens_PD, kept_kD, count)
        kept_kD = tokens_PD.index_select(0, order_A[:kept])
        orders.append(order_A)
    return torch.stack(orders)


def _spread_out(tokens_PD: Tensor, before_kD: Tensor, count: int) -> Tensor:
    """Return the positions of `count` tokens, each farthest from the tokens before it: (P, D), (k, D) -> (count,).

    The tokens before it are `before_kD` and all earlier choices. If `before_kD` is empty, the first choice is the token
    farthest from the rest.
    """
    distance_PP = cost.squared_distances(tokens_PD, tokens_PD)
    is_first = len(before_kD) == 0
    far_P = distance_PP.mean(dim=1) if is_first else cost.squared_distances(tokens_PD, before_kD).amin(dim=1)
    distance_PP.fill_diagonal_(-torch.inf)  # a chosen token is never the farthest again
    chosen: list[Tensor] = []
    for _ in range(count):
        chosen.append(far_P.argmax(dim=0, keepdim=True))
        row_P = distance_PP.index_select(0, chosen[-1])[0]
        far_P = row_P if is_first and len(chosen) == 1 else torch.fmin(far_P, row_P)  # fmin drops NaN
    return torch.cat(chosen)


def _check_count(count: int, positions: int) -> None:
    """Raise `SettingError` for a number of anchors outside [1, positions]."""
    if check_integer("count", count, minimum=1) > positions:
        raise SettingError(f"count must be at most {positions}, the positions of a frame, got {count}")


def _best_of_each_window(scores_TP: Tensor, *, rows: int, cols: int, window: int, local_count: float) -> Tensor:
    """Return a (T, P) mask of the best tokens of each window: `local_count` divided by the windows, rounded down."""
    frames, positions = scores_TP.shape
    cells_WE = _window_cells(rows, cols, window, scores_TP.device)
    share = min(int(local_count // cells_WE.shape[0]), cells_WE.shape[1])
    # Windows are padded to one size. The padding cells refer to one column past the frame, which always ranks last.
    padded_TP = torch.nn.functional.pad(_finite(scores_TP), (0, 1), value=-torch.inf)
    order_TWE = padded_TP[:, cells_WE].argsort(dim=2, descending=True, stable=True)[:, :, :share]
    best_TWE = cells_WE.expand(frames, -1, -1).gather(2, order_TWE)
    chosen_TP = torch.zeros(frames, positions + 1, dtype=torch.bool, device=scores_TP.device)
    return chosen_TP.scatter_(1, best_TWE.flatten(1), True)[:, :positions]


@lru_cache(maxsize=64)
def _window_cells(rows: int, cols: int, window: int, device: torch.device) -> Tensor:
    """Return the positions in each window, (W, E), ascending. A padding cell has the position `rows * cols`."""
    windows = [
        [row * cols + col for row in in_rows for col in in_cols]
        for in_rows in _cut(rows, window)
        for in_cols in _cut(cols, window)
    ]
    size = max(map(len, windows))
    return torch.tensor([cells + [rows * cols] * (size - len(cells)) for cells in windows], device=device)


def _cut(side: int, window: int) -> list[range]:
    """Return `side` cells cut into ceil(side / window) runs whose lengths differ by at most 1."""
    runs = -(-side // window)
    return [range(run * side // runs, (run + 1) * side // runs) for run in range(runs)]


def _finite(scores_TP: Tensor) -> Tensor:
    """Return the scores in float32 without NaN and infinities, which the ranking uses for its own marks."""
    limit = torch.finfo(torch.float32).max
    return scores_TP.float().nan_to_num(nan=-limit, posinf=limit, neginf=-limit)
