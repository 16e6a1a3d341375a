"""How many tokens survive. This module alone decides it, from sizes and settings.

An engine lays out placeholder tokens before the vision tower runs, so the counts cannot depend on pixels.

A video of T frames is cut into C clips. Its N tokens are spent on three things (sections 3.2 and 3.3 of the paper):

- A anchors of the key frame of each clip;
- `keep` tokens of each of the S = T - C later frames;
- originals, the unmerged anchors of a key frame. Only the released layout, `emit="both"`, has them, and only in the M
  clips that have later frames.

`keep` aims at kappa * A, so A = N / (C + M + S * kappa). At kappa = 1 the video is one clip. Without originals, the
counts of its frames then differ by at most 1.
"""

from dataclasses import dataclass
from functools import lru_cache

from aot_vllm.config import AOTConfig, check_retention
from aot_vllm.core.grid import VideoGrid


@dataclass(frozen=True)
class Budget:
    """The number of tokens of one reduced video, in total and by origin.

    `total` is the sum of `per_frame`. It is also the sum of `anchors_per_clip`, `originals_per_clip` and
    `keep_per_frame` together.
    """

    total: int
    """Number of tokens of the reduced video."""
    per_frame: tuple[int, ...]
    """Tokens that come from each frame, at least 1. A key frame counts its originals and its merged anchors."""
    anchors: int
    """Anchors of a frame. The first clips may have one more, see `anchors_per_clip`."""
    keep: int
    """Tokens kept of a later frame. Some frames may keep one more, see `keep_per_frame`. 0 without later frames."""
    clip_lengths: tuple[int, ...]
    """Number of frames of each clip, longer clips first."""
    anchors_per_clip: tuple[int, ...]
    """Anchors of every frame of each clip. There are at most two values, which differ by 1; the larger comes first."""
    keep_per_frame: tuple[int, ...]
    """Tokens that each later frame keeps; 0 for key frames."""
    originals_per_clip: tuple[int, ...]
    """Anchors of each key frame that are also emitted unmerged."""
    identity: bool
    """Whether every token survives and nothing is merged."""


def budget(grid: VideoGrid, *, retention: float, config: AOTConfig | None = None) -> Budget:
    """Return the exact token counts for a video of this size.

    `retention` in (0, 1] is the fraction kept: total = round(retention * T * P), with at least one token per frame.
    Raises `SettingError` for a retention outside its range.
    """
    config = config or AOTConfig()
    wanted = round(check_retention(retention) * grid.tokens)
    total = max(grid.frames, min(grid.tokens, wanted))
    clips = 1 if config.kappa == 1 else config.clips  # without merging across frames, all frames share evenly
    return _allocate(grid.frames, grid.positions, total, clips, config.kappa, config.emit == "both")


@lru_cache(maxsize=1024)
def _allocate(frames: int, positions: int, total: int, clips: int, kappa: float, twice: bool) -> Budget:
    """Return the allocation of `total` tokens, which is in [frames, frames * positions]."""
    num_clips = min(clips, frames)
    clip_lengths = tuple(frames // num_clips + (clip < frames % num_clips) for clip in range(num_clips))
    later_frames = frames - num_clips
    doubled_clips = sum(length > 1 for length in clip_lengths) if twice else 0
    identity = total == frames * positions
    if identity:
        anchors, keep, originals = num_clips * positions, later_frames * positions, 0
    else:
        anchors, keep, originals = _shares(total, positions, num_clips, later_frames, doubled_clips, kappa)

    anchors_per_clip = tuple(sorted(spread(anchors, num_clips), reverse=True))
    kept, doubled = iter(spread(keep, later_frames)), iter(spread(originals, doubled_clips))
    originals_per_clip = tuple(next(doubled) if doubled_clips and length > 1 else 0 for length in clip_lengths)
    keep_per_frame = tuple(next(kept) if step else 0 for length in clip_lengths for step in range(length))
    per_frame = list(keep_per_frame)
    first = 0
    for length, clip_anchors, clip_originals in zip(clip_lengths, anchors_per_clip, originals_per_clip, strict=True):
        per_frame[first] = clip_anchors + clip_originals
        first += length
    return Budget(
        total=total,
        per_frame=tuple(per_frame),
        anchors=min(anchors_per_clip),
        keep=keep // later_frames if later_frames else 0,
        clip_lengths=clip_lengths,
        anchors_per_clip=anchors_per_clip,
        keep_per_frame=keep_per_frame,
        originals_per_clip=originals_per_clip,
        identity=identity,
    )


def _shares(
    total: int, positions: int, clips: int, later_frames: int, doubled_clips: int, kappa: float
) -> tuple[int, int, int]:
    """Return how many tokens to spend on anchors, on kept tokens and on originals. Their sum is `total`.

    A = N / (C + M + S * kappa) is rounded down. The remainder is handed out in rounds: one more token for each later
    frame, then one more anchor for each clip, then one more original for each key frame. If `total` is too small for
    the ideal, the originals shrink first. If A reaches `positions`, the later frames keep more than kappa.
    """
    if later_frames == 0:
        return total, 0, 0
    ideal = int(total / (clips + doubled_clips + later_frames * kappa))
    level_anchors = min(positions, max(1, ideal), (total - later_frames) // clips)
    left = total - clips * level_anchors
    level_originals = min(level_anchors, (left - later_frames) // doubled_clips) if doubled_clips else 0
    left -= doubled_clips * level_originals
    level_keep = min(level_anchors, left // later_frames)
    left -= later_frames * level_keep

    anchors, keep, originals = clips * level_anchors, later_frames * level_keep, doubled_clips * level_originals
    while left:
        if level_keep < level_anchors:
            spent = min(left, later_frames)
            keep, level_keep, left = keep + spent, level_keep + 1, left - spent
        if level_anchors < positions:
            spent = min(left, clips)
            anchors, level_anchors, left = anchors + spent, level_anchors + 1, left - spent
        if level_originals < level_anchors:
            spent = min(left, doubled_clips)
            originals, level_originals, left = originals + spent, level_originals + 1, left - spent
    return anchors, keep, originals


def spread(tokens: int, places: int) -> tuple[int, ...]:
    """Return `places` counts whose sum is `tokens`. They differ by at most 1, and the larger ones are evenly spaced."""
    return tuple((place + 1) * tokens // places - place * tokens // places for place in range(places))
