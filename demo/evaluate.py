"""Ask the embedded model about clips it has never seen, in plain transformers: `python -m demo.evaluate MODEL`."""

from __future__ import annotations

import argparse
import math
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from rich.console import Console
from rich.table import Table

from demo.answering import BLOCKS, IGNORED, answer_logits, frame_features, normalise, pack
from demo.h264 import through_h264
from demo.task import KINDS, Question, questions, render, scene

Z = 1.96  # 95%


@dataclass(frozen=True)
class Share:
    """How many of how many answers were right."""

    right: int
    asked: int

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the share."""
        n = max(self.asked, 1)
        p = self.right / n
        middle, half = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
        return (middle - half) / (1 + Z**2 / n), (middle + half) / (1 + Z**2 / n)

    def __str__(self) -> str:
        """Show the share with its interval."""
        low, high = self.interval
        return f"{self.right / max(self.asked, 1):.1%} ({low:.1%} to {high:.1%}, n = {self.asked})"


@torch.no_grad()
def right_answers(model: Any, tokenizer: Any, asked: list[Question], features: torch.Tensor) -> list[bool]:
    """Return for each question about one video, features (T, tokens, width), whether greedy decoding answers it."""
    blocks = pack(tokenizer, [asked])
    logits, answers = answer_logits(model, tokenizer, features[None], blocks)
    owner = blocks.owner[blocks.labels != IGNORED]
    hits = (logits.argmax(-1) == answers).cpu()
    return [bool(hits[owner == index].all()) for index in range(len(asked))]


@torch.no_grad()
def evaluate(
    model: Any, tokenizer: Any, *, clips: int, split: str = "test", frames: slice = slice(None)
) -> dict[str, Share]:
    """Return the share of right answers by kind of question, overall, and about pairs held out of training.

    `frames` are those the model is shown of each clip.
    """
    tally: dict[str, list[bool]] = defaultdict(list)
    for seed in range(clips):
        made = scene(seed, split=split)
        pixels = normalise(through_h264(render(made)[0])[frames]).to(model.device)
        features = frame_features(model, pixels)
        asked = questions(made)
        for question, right in zip(asked, right_answers(model, tokenizer, asked, features), strict=True):
            tally[question.kind].append(right)
            tally["overall"].append(right)
            if question.answer in question.never_shown:
                tally["held-out pairs"].append(right)
    return {name: Share(sum(tally[name]), len(tally[name])) for name in (*KINDS, "overall", "held-out pairs")}


def main() -> None:
    """Print the table of a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--clips", type=int, default=200)
    arguments = parser.parse_args()
    model = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.float32)
    model.set_attn_implementation(BLOCKS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    table = Table(title=f"{arguments.clips} clips of the test split")
    table.add_column("kind")
    table.add_column("right")
    for name, share in evaluate(model.eval(), tokenizer, clips=arguments.clips).items():
        table.add_row(name, str(share))
    Console().print(table)


if __name__ == "__main__":
    main()
