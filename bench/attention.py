"""Measures how often the tokens that receive most attention, layer by layer, show an object of a question.

    python bench/attention.py --out bench/results/attention.md

The table has, for each score, the share of the highest-scoring pooled tokens of a frame that lie on an object of a
question, a thing or a speck. Attention received is the score of the method. Two more scores need no attention: the
length of a feature, and its cosine distance from the mean of its frame.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate

from bench.machine import ROOT, describe
from demo.answering import normalise
from demo.h264 import through_h264
from demo.task import GRID, cell_labels, render, scene

PICKED = 4  # tokens of a frame, about what is left at 10%


def pooled(values: Tensor) -> Tensor:
    """Return values of a tower's positions, (T, side * side, C), as the model pools them: (T, GRID * GRID, C)."""
    side = round(values.shape[1] ** 0.5)
    grid = values.unflatten(1, (side, side)).movedim(-1, 1)
    return interpolate(grid, size=(GRID, GRID), mode="bilinear").flatten(2).movedim(1, -1)


@torch.no_grad()
def scores(model: transformers.PreTrainedModel, pictures: np.ndarray) -> dict[str, Tensor]:
    """Return scores of frames' tokens by name, each (T, GRID * GRID)."""
    seen = model.model.vision_tower(normalise(pictures), output_attentions=True, output_hidden_states=True)
    received = {
        f"attention, layer {layer}": pooled(maps.mean(1).sum(1)[..., None])[..., 0]
        for layer, maps in enumerate(seen.attentions)
    }
    features = pooled(model.model.multi_modal_projector(seen.hidden_states[-1]))
    distance = 1 - cosine_similarity(features, features.mean(1, keepdim=True), dim=-1)
    return {**received, "length": features.norm(dim=-1), "distance from the frame's mean": distance}


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "demo" / "model")
    parser.add_argument("--clips", type=int, default=30)
    parser.add_argument("--out", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    model = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(
        arguments.model, dtype=torch.float32, attn_implementation="eager"
    )
    highest, lowest, by_chance = defaultdict(list), defaultdict(list), []
    for seed in range(arguments.clips):
        made = scene(seed, split="test")
        pictures, owners = render(made)
        labels = [cell_labels(made, frame, owner) for frame, owner in enumerate(owners)]
        matters = np.stack([((label.colour > 0) | (label.speck > 0)).ravel() for label in labels])
        by_chance.append(matters.mean())
        for name, score in scores(model, through_h264(pictures)).items():
            order = score.argsort(dim=1).numpy()
            lowest[name].append(np.take_along_axis(matters, order[:, :PICKED], 1).mean())
            highest[name].append(np.take_along_axis(matters, order[:, -PICKED:], 1).mean())
    lines = [f"| score | highest {PICKED} of a frame | lowest {PICKED} |", "|---|--:|--:|"]
    lines += [f"| {name} | {np.mean(highest[name]):.1%} | {np.mean(lowest[name]):.1%} |" for name in highest]
    lines.append(f"| by chance | {np.mean(by_chance):.1%} | {np.mean(by_chance):.1%} |")
    machine = describe(f"torch {torch.__version__}", f"transformers {transformers.__version__}")
    text = "\n".join(lines) + f"\n\n{arguments.clips} clips of the test split. {machine}\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
