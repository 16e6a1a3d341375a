"""Make the demo's clip: an H.264 file with shapes moving over a textured background.

`python -m demo.clip FILE`. Deterministic; decoded by vLLM like any other video.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from demo.h264 import write_h264


def frame(index: int, frames: int, *, height: int, width: int, seed: int) -> np.ndarray:
    """Return one frame, (height, width, 3) uint8: a texture, a red square going right, a green disc falling."""
    rng = np.random.default_rng(seed)
    rows, cols = np.mgrid[0:height, 0:width] / max(height, width)
    waves = rng.uniform(2, 9, (4, 2))
    phases = rng.uniform(0, 6.28, 4)
    progress = index / max(frames - 1, 1)
    texture = sum(
        np.sin(2 * np.pi * (a * rows + b * cols) + phase + progress)
        for (a, b), phase in zip(waves, phases, strict=True)
    )
    picture = np.repeat((110 + 18 * texture)[..., None], 3, axis=-1) * rng.uniform(0.7, 1.2, 3)
    side = height // 6
    left = int(progress * (width - side))
    top = height // 3
    picture[top : top + side, left : left + side] = (220, 40, 40)
    disc = (rows - (0.1 + 0.7 * progress) * height / width) ** 2 + (cols - 0.75) ** 2 < 0.006
    picture[disc] = (40, 200, 70)
    return np.clip(picture, 0, 255).astype(np.uint8)


def write_clip(path: Path, *, frames: int = 64, height: int = 360, width: int = 480, seed: int = 7) -> None:
    """Write an mp4 of that many frames at 8 frames a second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = (frame(index, frames, height=height, width=width, seed=seed) for index in range(frames))
    write_h264(path, pictures, crf=23)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    write_clip(parser.parse_args().file)
