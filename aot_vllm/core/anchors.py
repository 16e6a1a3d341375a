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
from aot_vllm.core.layout import check_clip_lengths, check_keep, clip_layout
from aot_vllm.errors import SettingError, ShapeError

# Likenesses of all pairs of a frame's tokens, and float32 copies of these, take this many bytes at a time.
LIKENESS_BYTES = 64 * 2**20


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


def select_diverse_anchors(
    features: Tensor,
    *,
    count: int,
    clip_lengths: Sequence[int] | None = None,
    keep: int | Sequence[int] | None = None,
) -> Tensor:
    """Return `count` distinct positions of every frame, in the order of their choice: (T, P, D) -> (T, count).

    One after the other the token least like any chosen before it, by cosine: greedy k-center (Gonzalez, "Clustering to
    minimize the maximum intercluster distance", 1985). What a frame repeats is chosen once; what stands out is chosen,
    however small. The first frame of a clip begins with its token least like the rest; each later one avoids what the
    frame before it keeps, so that frames show each what the other does not. A key frame keeps all it chooses, a later
    one the first `keep`, one count or one a frame, by default all; by default each frame is a clip of its own. A NaN is
    least like all.

    Raises `ShapeError` for features that are not (T, P, D), `SettingError` for counts that do not fit them.
    """
    if features.dim() != 3 or 0 in features.shape:
        raise ShapeError(f"features must have shape (frames, positions, width), none 0, got {tuple(features.shape)}")
    frames, positions, _ = features.shape
    _check_count(count, positions)
    layout = clip_layout(
        check_clip_lengths((1,) * frames if clip_lengths is None else clip_lengths, frames=frames),
        check_keep(count if keep is None else keep, frames=frames, anchors=count),
        (0,) * (frames if clip_lengths is None else len(clip_lengths)),
        count,
        features.device,
    )
    order_nA, kept_nkD = _choose(features, layout.key_frames, count, keep=None, before=None)
    walk, orders = [layout.key_frames], [order_nA]
    for step in layout.steps:
        # a frame that keeps less than others of its step repeats its first choice
        ranks_nk = layout.ranks[: step.most_kept].where(layout.ranks[: step.most_kept] < step.keep, 0)
        order_nA, kept_nkD = _choose(features, step.frames, count, keep=ranks_nk, before=kept_nkD[: len(step.frames)])
        walk.append(step.frames)
        orders.append(order_nA)
    return torch.cat(orders)[torch.cat(walk).argsort()]


def _choose(
    features_TPD: Tensor, frames_n: Tensor, count: int, *, keep: Tensor | None, before: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the choices of some frames, (n, count), and those that they keep as unit vectors, (n, k, D).

    `keep` (n, k) has the ranks of the choices that are kept, None for all; `before` is what the frames before keep.
    """
    _, positions, width = features_TPD.shape
    at_once = max(1, LIKENESS_BYTES // (8 * positions * (positions + width)))
    orders, kept = [], []
    for start in range(0, len(frames_n), at_once):
        some = slice(start, start + at_once)
        tokens_nPD = _unit(features_TPD.index_select(0, frames_n[some]))
        nearest_nP = None
        if before is not None and before.shape[1]:
            nearest_nP = torch.bmm(tokens_nPD, before[some].transpose(1, 2)).amax(dim=2)
        order_nA = _spread_out(torch.bmm(tokens_nPD, tokens_nPD.transpose(1, 2)), nearest_nP, count)
        kept_nk = order_nA if keep is None else order_nA.gather(1, keep[some])
        orders.append(order_nA)
        kept.append(tokens_nPD.take_along_dim(kept_nk.unsqueeze(2), 1))
    return torch.cat(orders), torch.cat(kept)


def _unit(features: Tensor) -> Tensor:
    """Return the features in float32, each of length 1; zero vectors stay what they are."""
    features = features.float()
    return features / cost.norms(features).unsqueeze(-1)


def _spread_out(likeness_nPP: Tensor, nearest_nP: Tensor | None, count: int) -> Tensor:
    """Return `count` tokens of each frame, each least like the ones before: (n, P, P) -> (n, count).

    `nearest_nP` says how much each is like what is already there; where nothing is, the first is least like the rest.
    """
    frames, positions, _ = likeness_nPP.shape
    rows_nP = likeness_nPP.flatten(0, 1)
    starts_n = torch.arange(0, frames * positions, positions, device=likeness_nPP.device)
    least_nP = likeness_nPP.mean(dim=2) if nearest_nP is None else nearest_nP
    chosen: list[Tensor] = []
    for _ in range(count):
        chosen.append(least_nP.argmin(dim=1))
        row_nP = rows_nP.index_select(0, starts_n + chosen[-1])
        # fmax lets no NaN pass, so that what is chosen stays infinitely near
        least_nP = row_nP if nearest_nP is None and len(chosen) == 1 else torch.fmax(least_nP, row_nP)
        least_nP.scatter_(1, chosen[-1].unsqueeze(1), torch.inf)
    return torch.stack(chosen, dim=1)


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
