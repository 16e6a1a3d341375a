"""Shares of right answers with their intervals, by bootstrap over clips.

Questions about one clip are not independent of each other.
"""

from __future__ import annotations

import dataclasses

import numpy as np

RESAMPLES = 2000


@dataclasses.dataclass
class Answers:
    """Whether the answers to the questions were right, and the clip and kind of each."""

    right: list[bool] = dataclasses.field(default_factory=list)
    clips: list[int] = dataclasses.field(default_factory=list)
    kinds: list[str] = dataclasses.field(default_factory=list)


def resampled(answers: Answers, *, kind: str | None = None) -> tuple[float, np.ndarray]:
    """Return the share of right answers, and the shares of `RESAMPLES` bootstrap samples of the clips."""
    seeds = sorted(set(answers.clips))
    index = {seed: place for place, seed in enumerate(seeds)}
    right, asked = np.zeros(len(seeds)), np.zeros(len(seeds))
    for was_right, seed, its_kind in zip(answers.right, answers.clips, answers.kinds, strict=True):
        if kind in (None, its_kind):
            right[index[seed]] += was_right
            asked[index[seed]] += 1
    draws = np.random.default_rng(0).integers(len(seeds), size=(RESAMPLES, len(seeds)))
    return right.sum() / asked.sum(), right[draws].sum(1) / np.maximum(asked[draws].sum(1), 1)


def interval(draws: np.ndarray) -> str:
    """Return the middle 95% of the draws, in percent."""
    low, high = np.quantile(draws, (0.025, 0.975))
    return f"{low:.1%} to {high:.1%}"
