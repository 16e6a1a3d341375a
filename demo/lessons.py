"""Auxiliary tasks of training: what each cell shows, what a clip has shown so far, and with which tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, smooth_l1_loss

from demo.task import BACKGROUNDS, COLOURS, GRID, HELD_OUT, HISTORY_CLASSES, MARKS, SHAPES, CellLabels

CELL_CLASSES = {
    "colour": COLOURS,
    "shape": SHAPES,
    "mark": MARKS,
    "speck": COLOURS,
    "background": BACKGROUNDS,
    "row": range(GRID),  # of the cell: a text model cannot count tokens, but has to tell places and directions
    "column": range(GRID),
}
LEAST_KEPT = 0.04  # of a video's tokens, where some are left out


def cell_heads(width: int) -> nn.ModuleDict:
    """Return the linear maps that read what a cell shows from its feature; used in the tower's stage alone."""
    heads = {name: nn.Linear(width, len(classes) + 1) for name, classes in CELL_CLASSES.items()}
    return nn.ModuleDict({**heads, "centre": nn.Linear(width, 2), "radius": nn.Linear(width, 1)})


def history_heads(width: int) -> nn.ModuleDict:
    """Return the maps that read what a clip has shown from the text model's middle layer; used in training alone."""
    return nn.ModuleDict(
        {name: nn.Sequential(nn.RMSNorm(width), nn.Linear(width, len(c) + 1)) for name, c in HISTORY_CLASSES.items()}
    )


def cell_loss(heads: nn.ModuleDict, features: Tensor, labels: Sequence[CellLabels]) -> Tensor:
    """Return the loss of predicting the content of cells from the features of frames, (F, tokens, width)."""

    def truth(name: str) -> Tensor:
        return torch.from_numpy(np.stack([getattr(label, name) for label in labels])).to(features.device).flatten(0, 2)

    total = 0.01 * features.float().square().mean()
    for name in CELL_CLASSES:
        wanted = truth(name)
        logits = heads[name](features).float().flatten(0, 1)
        if name == "shape":
            logits = logits.masked_fill(never_shown_shapes().to(logits.device)[truth("colour")], -torch.inf)
        losses = cross_entropy(logits, wanted, reduction="none")
        there = wanted > 0
        for part, weight in ((losses[there], 1.0), (losses[~there], 0.5)):
            if part.numel():
                total = total + weight * part.mean()
    there = truth("colour") > 0
    if there.any():
        for name in ("centre", "radius"):
            wanted = truth(name)[there]
            told = heads[name](features).float().flatten(0, 1)[there]
            total = total + 2 * smooth_l1_loss(told, wanted.reshape(told.shape), beta=0.3)
    return total


def never_shown_shapes() -> Tensor:
    """Return for colour and shape, numbered as in `CellLabels`, whether training lacks the pair.

    What it lacks is left out of the loss; else a tower learns of a red thing that it is no circle, whatever it sees.
    """
    lacking = torch.zeros(len(COLOURS) + 1, len(SHAPES) + 1, dtype=torch.bool)
    for colour, shape in HELD_OUT:
        lacking[list(COLOURS).index(colour) + 1, SHAPES.index(shape) + 1] = True
    return lacking


def history_loss(
    heads: nn.ModuleDict, states: Tensor, labels: Sequence[dict[str, np.ndarray]], cells: Tensor
) -> Tensor:
    """Return the loss of predicting, from a layer's states (B, K, width), what clips have shown at cells (B, K)."""
    total = states.new_zeros((), dtype=torch.float32)
    for name, head in heads.items():
        every = torch.from_numpy(np.stack([clip[name] for clip in labels])).to(states.device).flatten(1)
        wanted = every.gather(1, cells).flatten()
        logits = head(states).float().flatten(0, 1)
        if (wanted > 0).any():
            total = total + cross_entropy(logits, wanted, ignore_index=0)
    return total / len(heads)


def every_cell(shown: np.ndarray) -> np.ndarray:
    """Return the places of all cells of clips whose cells are `shown`, (B, T, GRID, GRID): (B, T * GRID * GRID)."""
    return np.tile(np.arange(shown[0].size), (len(shown), 1))


def some_cells(shown: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the places of some cells of each clip, ascending, of all clips equally many: (B, K).

    From all of them down to `LEAST_KEPT`, short sequences as often as long ones. Which ones follows from noise of the
    cell, of its frame and of its place in all frames, and from whether it shows a thing (`shown`, (B, T, GRID, GRID)),
    each with a weight of its own in each clip, the last of either sign: no way of choosing tokens is the one trained.
    """
    clips, frames = shown.shape[:2]
    count = int(shown[0].size * LEAST_KEPT ** rng.random())
    parts = rng.standard_normal(shown.shape), rng.standard_normal((clips, frames, 1, 1))
    parts += (rng.standard_normal((clips, 1, GRID, GRID)), shown)
    weights = np.abs(rng.standard_normal((len(parts), clips, 1, 1, 1)))
    weights[-1] = 1.5 * rng.standard_normal(weights[-1].shape)
    scores = sum(weight * part for weight, part in zip(weights, parts, strict=True)).reshape(clips, -1)
    return np.sort(np.argsort(scores, axis=1)[:, -count:], axis=1)
