"""The content of a training step: clips, frames, and the questions about them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from demo.h264 import through_h264
from demo.task import KINDS, NUM_FRAMES, CellLabels, Question, cell_labels, questions, render, scene

FRAMES_PER_SCENE = 4  # of the tower's stage
JOINT_SEEDS = 10_000_000  # clips from here on are the joint stage's
QUESTIONS_PER_CLIP = 12
POOL_START, POOL_GROWTH, POOL_LIMIT = 64, 3, 24_000  # clips of the text stages: at first, more each step, in all

Clip = tuple[np.ndarray, np.ndarray]
"""A clip's frames, (T, SIZE, SIZE, 3) uint8, and the colours of the things in their cells, (T, GRID, GRID)."""


@dataclass(frozen=True)
class Stage:
    """The size of a stage's steps: `batch` is the number of clips per step, `frames` the number of frames per clip."""

    name: str
    steps: int
    batch: int
    frames: int
    peak_rate: float
    trains_tower: bool
    trains_text: bool
    in_part: float = 0.0  # how many of the steps leave tokens out


@dataclass(frozen=True)
class Batch:
    """The content of one step: clips by seed, with their frames if the stage needs frames."""

    seeds: list[int]
    clips: list[Clip | None]  # None where features of it are kept
    pictures: np.ndarray | None  # in the tower's stage, (F, SIZE, SIZE, 3), and
    labels: list[CellLabels]  # what they show
    asked: list[list[Question]]  # in the other stages
    frames: slice  # of each clip's features


class Batches(Dataset[Batch]):
    """The batches of a run's stage by step; a loader's processes can make them ahead of time."""

    def __init__(self, directory: Path, stages: Sequence[Stage], stage_index: int) -> None:
        """Take the run's directory, where features may lie."""
        self.directory = directory
        self.stage = stages[stage_index]
        self.stage_index = stage_index
        self.steps_before = sum(stage.steps for stage in stages[1:stage_index])

    def __getitem__(self, step: int) -> Batch:
        """Return the batch of this step."""
        stage = self.stage
        rng = np.random.default_rng((self.stage_index, step))
        if not stage.trains_text:
            seeds = list(range(step * stage.batch, (step + 1) * stage.batch))
            pictures, labels = zip(*map(frames_and_labels, seeds), strict=True)
            return Batch(seeds, [], np.concatenate(pictures), list(itertools.chain(*labels)), [], slice(None))
        if stage.trains_tower:
            first = JOINT_SEEDS + step * stage.batch
            seeds = list(range(first, first + stage.batch))
        else:
            pool = min(POOL_LIMIT, POOL_START + POOL_GROWTH * (self.steps_before + step))
            seeds = rng.choice(pool, stage.batch, replace=False).tolist()
        stride = NUM_FRAMES // stage.frames
        return Batch(
            seeds,
            [None if self.features_path(seed).exists() else clip(seed) for seed in seeds],
            None,
            [],
            [choose(questions(scene(seed, split="train")), rng) for seed in seeds],
            slice(int(rng.integers(stride)), None, stride),
        )

    def features_path(self, seed: int) -> Path:
        """Return where a clip's features are kept once a tower that is no longer trained has seen it."""
        return self.directory / "features" / f"{seed // 1000}" / f"{seed}.pt"


def frames_and_labels(seed: int, *, split: str = "train") -> tuple[np.ndarray, list[CellLabels]]:
    """Return some frames of a scene and the labels of their cells."""
    made = scene(seed, split=split)
    start = seed % (NUM_FRAMES // FRAMES_PER_SCENE)
    frames = range(start, NUM_FRAMES, NUM_FRAMES // FRAMES_PER_SCENE)
    pictures, owners = render(made, frames=frames)
    labels = [cell_labels(made, frame, owner) for frame, owner in zip(frames, owners, strict=True)]
    return through_h264(pictures), labels


def clip(seed: int) -> Clip:
    """Return a training clip's frames, as read back from a video file, and the colours of their cells."""
    made = scene(seed, split="train")
    pictures, owners = render(made)
    colours = [cell_labels(made, frame, owner).colour for frame, owner in enumerate(owners)]
    return through_h264(pictures), np.stack(colours)


def choose(asked: Sequence[Question], rng: np.random.Generator) -> list[Question]:
    """Return a dozen of a clip's questions, the kinds as even as they can be."""
    by_kind = {kind: [question for question in asked if question.kind == kind] for kind in KINDS}
    for group in by_kind.values():
        rng.shuffle(group)  # type: ignore[arg-type]
    rounds = itertools.zip_longest(*by_kind.values())
    return [question for question in itertools.chain(*rounds) if question is not None][:QUESTIONS_PER_CLIP]
