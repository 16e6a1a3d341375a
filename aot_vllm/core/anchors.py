"""Which tokens of a frame become anchors: by attention (section 3.2 of the paper, "token anchors"), or by diversity.

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

    The best `floor(count * (1 - global_ratio) / windows)` tokens of each window by local score, then the best of the
    others by global score until the count is met. Where `window` does not divide a side, the side is cut into as many
    windows as it would need, of sides that differ by at most 1, so that none gives more anchors a cell than its
    neighbours; one with fewer cells than its share gives all it has. Ties go to the lower position, whatever the batch
    or the device. A NaN ranks lowest, like negative infinity.

    Raises `ShapeError` for scores that don't fit the grid, `SettingError` for a count outside 1 to P.
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
    # Local anchors come first in one ranking, so the global ones fill up to the count without a second selection.
    priority_TP = _finite(global_scores).masked_fill(is_local_TP, torch.inf)
    order_TP = priority_TP.argsort(dim=1, descending=True, stable=True)
    return order_TP[:, :count].sort(dim=1).values


def select_diverse_anchors(features: Tensor, *, count: int, keep: int | Sequence[int] | None = None) -> Tensor:
    """Return `count` distinct positions of every frame, in the order of their choice: (T, P, D) -> (T, count).

    One after the other the token farthest from all chosen before it: greedy k-center (Gonzalez, "Clustering to
    minimize the maximum intercluster distance", 1985) by Euclidean distance. What a frame repeats is chosen once; what
    stands out is chosen, however small. The first frame begins with its token farthest from the rest; each later one
    avoids what the frame before it keeps, so that frames show each what the other does not. A frame keeps the first
    `keep` of its choices, one count or one a frame, by default all. A NaN changes no count. Entries must be below
    1e18 / sqrt(D), where squares overflow.

    Raises `ShapeError` for features that are not (T, P, D), `SettingError` for counts that do not fit them.
    """
    if features.dim() != 3 or 0 in features.shape:
        raise ShapeError(f"features must have shape (frames, positions, width), none 0, got {tuple(features.shape)}")
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
    """Return `count` tokens, each farthest from the ones before it and from what is already there: (P, D) -> (count,).

    Where nothing is, the first is farthest from the rest.
    """
    distance_PP = cost.squared_distances(tokens_PD, tokens_PD)
    is_first = len(before_kD) == 0
    far_P = distance_PP.mean(dim=1) if is_first else cost.squared_distances(tokens_PD, before_kD).amin(dim=1)
    distance_PP.fill_diagonal_(-torch.inf)  # what is chosen is as near as can be
    chosen: list[Tensor] = []
    for _ in range(count):
        chosen.append(far_P.argmax(dim=0, keepdim=True))
        row_P = distance_PP.index_select(0, chosen[-1])[0]
        far_P = row_P if is_first and len(chosen) == 1 else torch.fmin(far_P, row_P)  # which lets no NaN pass
    return torch.cat(chosen)


def _check_count(count: int, positions: int) -> None:
    """Raise `SettingError` for a count of anchors that a frame can't have."""
    if check_integer("count", count, minimum=1) > positions:
        raise SettingError(f"count must be at most {positions}, the positions of a frame, got {count}")


def _best_of_each_window(scores_TP: Tensor, *, rows: int, cols: int, window: int, local_count: float) -> Tensor:
    """Return a (T, P) mask of the best tokens of each window, `local_count` in all, rounded down window by window."""
    frames, positions = scores_TP.shape
    cells_WE = _window_cells(rows, cols, window, scores_TP.device)
    share = min(int(local_count // cells_WE.shape[0]), cells_WE.shape[1])
    # One column past the frame stands for the cells that pad the windows at the edges: it always ranks last.
    padded_TP = torch.nn.functional.pad(_finite(scores_TP), (0, 1), value=-torch.inf)
    order_TWE = padded_TP[:, cells_WE].argsort(dim=2, descending=True, stable=True)[:, :, :share]
    best_TWE = cells_WE.expand(frames, -1, -1).gather(2, order_TWE)
    chosen_TP = torch.zeros(frames, positions + 1, dtype=torch.bool, device=scores_TP.device)
    return chosen_TP.scatter_(1, best_TWE.flatten(1), True)[:, :positions]


@lru_cache(maxsize=64)
def _window_cells(rows: int, cols: int, window: int, device: torch.device) -> Tensor:
    """Return the positions in each window, (W, E), ascending; `rows * cols` stands for a cell outside the grid."""
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
    """Return the scores in float32 without NaN or infinities, which the ranking needs for itself."""
    limit = torch.finfo(torch.float32).max
    return scores_TP.float().nan_to_num(nan=-limit, posinf=limit, neginf=-limit)
