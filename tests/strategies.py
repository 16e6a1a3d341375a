"""Hypothesis strategies for sizes, settings and seeded tensors. Every run draws the same examples."""

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from aot_vllm import AOTConfig, VideoGrid

REPEATABLE = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.differing_executors],
}
few = settings(max_examples=30, **REPEATABLE)
many = settings(max_examples=200, **REPEATABLE)

seeds = st.integers(0, 2**31)
retentions = st.one_of(st.floats(0.001, 1.0), st.sampled_from([0.01, 0.05, 0.1, 0.25, 0.5, 0.9, 0.99, 1.0]))
configs = st.builds(
    AOTConfig,
    anchors=st.sampled_from(["diverse", "attention", "calibrated", "coverage"]),
    distance=st.sampled_from(["euclidean", "cosine"]),
    memory=st.sampled_from(["previous", "carried", "all"]),
    by_attention=st.booleans(),
    by_relevance=st.booleans(),
    without_sinks=st.booleans(),
    mass=st.sampled_from([0.0, 0.2, 1.0, 5.0]),
    nearest_weight=st.sampled_from([0.0, 0.1, 1.0]),
    global_ratio=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    window=st.integers(1, 10),
    clips=st.integers(1, 9),
    kappa=st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0]),
    emit=st.sampled_from(["both", "compact"]),
)


def grids(frames: int, side: int) -> st.SearchStrategy[VideoGrid]:
    """Grids of at most `frames` frames, whose rows and columns are at most `side`."""
    return st.builds(VideoGrid, st.integers(1, frames), st.integers(1, side), st.integers(1, side))


def noise(seed: int, *shape: int) -> torch.Tensor:
    """Return standard normal noise in float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def video(seed: int, grid: VideoGrid, width: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return features (T, P, width) that change slowly, and local and global scores (T, P)."""
    scene, change = noise(seed, 1, grid.positions, width), noise(seed + 1, grid.frames, grid.positions, width)
    features = scene + 0.4 * change.cumsum(0)
    local_scores, global_scores = noise(seed + 2, 2, grid.frames, grid.positions).exp()
    return features, local_scores, global_scores
