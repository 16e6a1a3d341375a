"""The inputs the golden files were measured on, made again from the seed, frames and dim each file carries.

A scene of low spatial frequencies that changes sign every 11 frames, a blob that moves across it, and noise. The draws
and their order are part of the files.
"""

import numpy as np
import torch

SIDE = 27


def make_inputs(seed: int, frames: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features (T, 729, dim), local scores and global scores (T, 729), all float32."""
    random = np.random.RandomState(seed)
    axis = np.linspace(0, 1, SIDE)
    y, x = axis[:, None], axis[None, :]
    frequency = random.uniform(0.5, 3.0, (dim, 2))
    phase = random.uniform(0, 6.28, dim)
    amplitude = random.uniform(0.3, 1.5, dim)
    waves = 2 * np.pi * (frequency[:, 0] * y[..., None] + frequency[:, 1] * x[..., None])
    scene = amplitude * np.cos(waves + phase)
    blob_feature = random.randn(dim) * 1.5

    features, local_scores, global_scores = [], [], []
    for frame in range(frames):
        center_y = 0.5 + 0.35 * np.sin(0.21 * frame + seed)
        center_x = 0.5 + 0.35 * np.cos(0.17 * frame + seed)
        blob = np.exp(-(((y - center_y) ** 2 + (x - center_x) ** 2) / 0.01))
        sign = -0.6 if (frame // 11) % 2 else 1.0
        features.append(sign * scene + blob[..., None] * blob_feature + 0.15 * random.randn(SIDE, SIDE, dim))
        local_scores.append(0.4 * np.abs(scene[..., 0]) + 0.3 * blob + 0.5 * random.rand(SIDE, SIDE))
        global_scores.append(blob + 0.2 * np.abs(scene[..., 1]) + 0.5 * random.rand(SIDE, SIDE))
    stacked = (np.stack(part).astype(np.float32) for part in (features, local_scores, global_scores))
    features, local_scores, global_scores = (torch.from_numpy(part) for part in stacked)
    return features.flatten(1, 2), local_scores.flatten(1), global_scores.flatten(1)
