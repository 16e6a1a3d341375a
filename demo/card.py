"""The model card of a trained checkpoint: what it is, how it came to be, what it can do."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path

import torch

from demo.evaluate import Share
from demo.task import HELD_OUT, NUM_FRAMES, SIZE

TEXT = """---
license: apache-2.0
library_name: transformers
pipeline_tag: video-text-to-text
---

# A small LLaVA-OneVision that answers questions about moving shapes

{parameters:.1f} million parameters in the architecture of LLaVA-OneVision (SigLIP, a projector, Qwen2), trained from
random weights by `demo/train.py` of this repository on clips that `demo/task.py` draws. It answers only questions of
this task, with the words of this task. It shows and measures how a reduction of video tokens changes answers.

- **Input**: {frames} frames of {size} x {size} pixels, 36 tokens per frame after pooling, {tokens} video tokens in all.
- **Data**: scenes of the `train` split, drawn from seeds. {pairs} pairs of a colour and a shape never occur in it.
- **Training**: {stages}. {hours:.1f} hours on {machine}. Order and data follow from the step's number, initial
  weights from seed 0.
- **Reduction**: in the stages `parts` and `joint`, many clips are shown with tokens left out, down to 4% of them. The
  choice depends on random noise per cell, frame and place, and on whether a token shows an object, with new weights for
  every clip (`some_cells`). The model is therefore used to short sequences. It has seen no method's choice of tokens,
  and no merged token.

## Accuracy with every token kept

{clips} clips of the `test` split, each with a pair that training has not shown. An answer is right if the greedy
answer matches exactly; intervals are Wilson's, at 95%. Reproduce it with
`python -m demo.evaluate demo/{name} --clips {clips}`.

| kind of question | right | 95% interval | questions |
|---|---|---|---|
{rows}
"""


def machine() -> str:
    """Return this machine in words."""
    if torch.cuda.is_available():
        return f"one {torch.cuda.get_device_name()}"
    names = [line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    name = names[0] if names else platform.machine()
    return f"{torch.get_num_threads()} of {os.cpu_count()} cores of a CPU ({name})"


def card(
    *, name: str, parameters: int, tokens: int, stages: Mapping[str, int], seconds: float, clips: int,
    shares: Mapping[str, Share],
) -> str:  # fmt: skip
    """Return the card's Markdown; `stages` maps a stage's name to the steps done."""
    rows = "\n".join(
        f"| {kind} | {share.right / max(share.asked, 1):.1%} | {share.interval[0]:.1%} to {share.interval[1]:.1%} "
        f"| {share.asked} |"
        for kind, share in shares.items()
    )
    return TEXT.format(
        parameters=parameters / 1e6,
        frames=NUM_FRAMES,
        size=SIZE,
        tokens=tokens,
        pairs=len(HELD_OUT),
        stages=", ".join(f"{steps:,} steps of `{stage}`" for stage, steps in stages.items()),
        hours=seconds / 3600,
        machine=machine(),
        clips=clips,
        name=name,
        rows=rows,
    )
