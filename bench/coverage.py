"""Measures without labels how much of a video is covered by what each selection keeps.

    python bench/coverage.py --videos *.mp4 --pictures *.png --out bench/results/coverage.md

Towers: that of the embedded model, on clips of its task, and one of SigLIP's architecture with random weights, on the
given videos, and on pans, zooms and a cut over the given pictures. Random weights keep what a picture has: what looks
alike has features that are alike. They say nothing of attention that training brings about.

Of every token of the video, by what is kept of it:

- covered: the share of tokens with a kept token of a cosine of at least 0.9;
- mean gap, largest gap: 1 minus the cosine of the nearest kept token;
- quantisation: the squared distance to the nearest kept token, as it is emitted, by that to the mean of the video;
- change kept: the share of the frames' change (squared distance of a token to the one at its position in the frame
  before) that lies at kept tokens. 10% of the tokens at random keep 10% of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import av
import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from aot_vllm import AOTConfig, ReducedVideo, VideoGrid, reduce_video
from aot_vllm.presets import PRESETS
from bench.arms import at_random, uniform
from bench.attention import pooled
from bench.machine import ROOT, describe
from demo.answering import normalise
from demo.h264 import through_h264
from demo.task import GRID, render, scene

COVERED = 0.9
COLUMNS = ("covered", "mean gap", "largest gap", "quantisation", "change kept")
SIDE, PATCH = 224, 16
"""Side of a picture for the tower with random weights, and of its patches."""


@dataclass(frozen=True)
class Clip:
    """Features (T, P, D) of a tower and the attention received in its two scoring layers, (T, P)."""

    features: Tensor
    local_scores: Tensor
    global_scores: Tensor
    grid: VideoGrid


def measures(features: Tensor, reduced: ReducedVideo) -> list[float]:
    """Return the numbers of `COLUMNS` for one reduced video."""
    tokens = features.flatten(0, 1)
    cols = round(features.shape[1] ** 0.5)  # frames of all clips here are square
    places = reduced.frames * features.shape[1] + reduced.rows * cols + reduced.cols
    directions = normalize(tokens, dim=-1)
    gaps = 1 - (directions @ directions[places].T).amax(1)
    nearest = torch.cdist(tokens, reduced.tokens.float()).square().amin(1)
    spread = (tokens - tokens.mean(0)).square().sum(1)
    changed = torch.zeros(features.shape[:2])
    changed[1:] = (features[1:] - features[:-1]).square().sum(-1)
    kept = changed.flatten()[places.unique()].sum() / changed.sum()
    covered = (gaps <= 1 - COVERED).float().mean()
    return [float(x) for x in (covered, gaps.mean(), gaps.max(), nearest.sum() / spread.sum(), kept)]


def arms() -> dict[str, Callable[..., ReducedVideo]]:
    """Return every selection by name, with the arguments of `reduce_video`."""
    settings = {f"preset {name}": AOTConfig.preset(name) for name in PRESETS if name != "paper"}
    settings |= {
        "diverse, carried memory": AOTConfig(memory="carried"),
        "diverse, memory of all": AOTConfig(memory="all"),
        "diverse, cosine": AOTConfig(distance="cosine"),
        "calibrated, by attention alone": changed("calibrated", by_relevance=False),
        "calibrated, by relevance alone": changed("calibrated", by_attention=False, without_sinks=None),
        "coverage, memory of the previous frame": changed("coverage", memory="previous"),
        "coverage, memory of all": changed("coverage", memory="all"),
        "attention": AOTConfig(anchors="attention"),
        "attention without sinks": AOTConfig(anchors="attention", without_sinks=True),
        "preset paper, scoring layers of the default": changed("paper", local_layer=None),
    }
    named: dict[str, Callable[..., ReducedVideo]] = {name: configured(config) for name, config in settings.items()}
    return named | {"uniform": uniform, "random": at_random}


def changed(preset: str, **single: object) -> AOTConfig:
    """Return a preset with single settings in place of its own; None takes one out."""
    given = {name: value for name, value in {**PRESETS[preset], **single}.items() if value is not None}
    return AOTConfig(**given)  # type: ignore[arg-type]


def configured(config: AOTConfig) -> Callable[..., ReducedVideo]:
    """Return `reduce_video` with these settings."""
    return lambda *tensors, **rest: reduce_video(*tensors, config=config, **rest)


# ---- towers and clips


@torch.no_grad()
def embedded_clips(number: int) -> Iterator[Clip]:
    """Yield clips of the embedded model's test split, as its own vision tower and projector see them."""
    model = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(
        ROOT / "demo" / "model", dtype=torch.float32, attn_implementation="eager"
    )
    for seed in range(number):
        pixels = normalise(through_h264(render(scene(seed, split="test"))[0]))
        seen = model.model.vision_tower(pixels, output_attentions=True, output_hidden_states=True)
        features = pooled(model.model.multi_modal_projector(seen.hidden_states[-1]))
        yield clip_of(features, [pooled(maps.mean(1).sum(1)[..., None])[..., 0] for maps in seen.attentions], GRID)


@torch.no_grad()
def random_tower_clips(pictures: list[np.ndarray]) -> Iterator[Clip]:
    """Yield clips, (T, SIDE, SIDE, 3) uint8 each, as a tower with random weights sees them."""
    torch.manual_seed(0)
    config = transformers.SiglipVisionConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=6,
        image_size=SIDE,
        patch_size=PATCH,
        attn_implementation="eager",
    )
    tower = transformers.SiglipVisionModel(config).eval()
    for frames in pictures:
        seen = tower(normalise(frames), output_attentions=True)
        yield clip_of(seen.last_hidden_state, [maps.mean(1).sum(1) for maps in seen.attentions], SIDE // PATCH)


def clip_of(features: Tensor, received: list[Tensor], side: int) -> Clip:
    """Return a clip, scored by the layers at the depths of the default."""
    local = round(5 / 26 * len(received))
    return Clip(features, received[local], received[-2], VideoGrid(len(features), side, side))


def video_frames(path: Path, number: int) -> np.ndarray:
    """Return evenly spaced frames of a video file, (T, SIDE, SIDE, 3) uint8."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(width=SIDE, height=SIDE, format="rgb24") for frame in container.decode(video=0)]
    return np.stack([frames[int(at)] for at in np.linspace(0, len(frames) - 1, number)])


def over_picture(path: Path, number: int) -> np.ndarray:
    """Return a pan over a picture, and after a cut a zoom into it, (T, SIDE, SIDE, 3) uint8."""
    picture = Image.open(path).convert("RGB")
    width, height = picture.size
    side = min(width, height) * 0.6
    boxes = []
    for step in np.linspace(0, 1, number // 2):
        left, top = (width - side) * step, (height - side) * 0.3
        boxes.append((left, top, left + side, top + side))
    for step in np.linspace(1, 0.5, number - number // 2):
        half = min(width, height) * step / 2
        boxes.append((width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half))
    return np.stack([np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box)) for box in boxes])


# ---- tables


def table(clips: list[Clip], retention: float) -> str:
    """Return a table of all selections at one retention, means over clips."""
    lines = [f"| {retention:.0%} kept | " + " | ".join(COLUMNS) + " |", "|---|" + "--:|" * len(COLUMNS)]
    for name, arm in arms().items():
        rows = []
        for clip in clips:
            scores = (clip.local_scores, clip.global_scores)
            rows.append(measures(clip.features, arm(clip.features, *scores, grid=clip.grid, retention=retention)))
        covered, mean, largest, quantisation, kept = np.mean(rows, axis=0)
        cells = (f"{covered:.1%}", f"{mean:.4f}", f"{largest:.3f}", f"{quantisation:.3f}", f"{kept:.1%}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clips", type=int, default=12, help="of the embedded model's task")
    parser.add_argument("--frames", type=int, default=16, help="of each video and picture")
    parser.add_argument("--videos", type=Path, nargs="*", default=[])
    parser.add_argument("--pictures", type=Path, nargs="*", default=[])
    parser.add_argument("--retentions", type=float, nargs="+", default=[0.25, 0.10, 0.05])
    parser.add_argument("--out", type=Path, help="also write the tables here")
    arguments = parser.parse_args()
    towers = {f"The embedded model, {arguments.clips} clips of its task": list(embedded_clips(arguments.clips))}
    given = [video_frames(path, arguments.frames) for path in arguments.videos]
    given += [over_picture(path, arguments.frames) for path in arguments.pictures]
    if given:
        names = ", ".join(path.name for path in (*arguments.videos, *arguments.pictures))
        towers[f"A tower with random weights, {len(given)} clips ({names})"] = list(random_tower_clips(given))
    parts = []
    for name, clips in towers.items():
        parts += [f"{name}:", *(table(clips, retention) for retention in arguments.retentions)]
    parts.append(describe(f"torch {torch.__version__}", f"transformers {transformers.__version__}"))
    text = "\n\n".join(parts) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
