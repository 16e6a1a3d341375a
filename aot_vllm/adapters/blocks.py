"""A vision tower's work on a long video, a block of frames at a time, in no more memory than was profiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor


def frames_at_once(frames: int, *, profiled: float, waiting_share: float) -> int:
    """Return how many of a video's frames the tower may look at, at least one.

    `profiled`: the frames that memory was profiled with; of a longer video fewer, for the features of all its frames
    wait for the reduction meanwhile. `waiting_share`: what a frame's features take of what the tower needs for it.
    """
    if frames > profiled:
        profiled -= waiting_share * frames
    return max(1, int(profiled))


def in_blocks(tower: Callable[[Tensor], Tensor], blocks: Sequence[Tensor], *, frames: int) -> Tensor:
    """Return the features of all `frames`, (frames, ...), of which `tower` makes those of one block after the other.

    A block's features go to their place at once: joined at the end, all would be there twice.
    """
    if len(blocks) == 1:
        return tower(blocks[0])
    features = None
    end = 0
    for block in blocks:
        made = tower(block)
        if features is None:
            features = made.new_empty(frames, *made.shape[1:])
        start, end = end, end + len(made)
        features[start:end] = made
        del made  # or it would be there while the tower makes the next
    assert features is not None, "a video has frames"  # noqa: S101
    return features
