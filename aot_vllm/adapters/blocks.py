"""A vision tower's work on a long video, in blocks of frames that need no more memory than was profiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor


def frames_at_once(frames: int, *, profiled: float, waiting_share: float) -> int:
    """Return how many frames of a video the tower may process at a time, at least one.

    `profiled`: the number of frames that memory was profiled with. A longer video gets smaller blocks, because the
    features of all its frames wait for the reduction in the same memory. `waiting_share`: the memory of a frame's
    features, as a fraction of the memory that the tower needs for the frame.
    """
    if frames > profiled:
        profiled -= waiting_share * frames
    return max(1, int(profiled))


def in_blocks(tower: Callable[[Tensor], Tensor], blocks: Sequence[Tensor], *, frames: int) -> Tensor:
    """Return the features of all `frames`, (frames, ...), computed by `tower` block by block.

    The features of a block are copied to their place at once. A join at the end would need memory for all twice.
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
        del made  # frees its memory before the tower computes the next block
    assert features is not None, "a video has frames"  # noqa: S101
    return features
