"""Checks what vLLM's own decoders read of a video: fewer frames than it holds are an error, not a silent answer.

A container may announce fewer frames than it holds (a fragmented MP4, a WebM without a length), and a damaged one
holds fewer than it announces. vLLM then samples from what it has been told, or goes on with what it could decode.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

ENOUGH = 0.75
"""The share of a video's frames that its container must announce. Neither count is exact to the frame."""


def missing_frames(data: bytes, *, announced: int, sampled: Sequence[int], num_read: int) -> str | None:
    """Return what is wrong with the frames that were read of a video, or None if nothing is.

    `announced`: the number of frames that the decoder was told. `sampled`: the indices that it was asked for.
    """
    wanted = len(set(sampled))
    if num_read < wanted:
        return (
            f"only {num_read} of the {wanted} frames sampled from the video could be decoded; an engine with "
            '--media-io-kwargs \'{"video": {"frame_recovery": true}}\' replaces those that could not'
        )
    shown = count_pictures(data)
    if shown is not None and announced < ENOUGH * shown:
        return f"the video announces {max(announced, 0)} frames but holds {shown}, so that most would not be looked at"
    return None


def count_pictures(data: bytes) -> int | None:
    """Return how many pictures the first video stream of a file holds, None if it can't be told."""
    try:
        import av
    except ImportError:  # an engine without PyAV decodes with something else
        return None
    try:
        with av.open(io.BytesIO(data), "r") as container:
            if not container.streams.video:
                return None
            shown = [packet for packet in container.demux(video=0) if packet.size and not packet.is_discard]
    except (av.FFmpegError, ValueError):
        return None
    times = {packet.pts for packet in shown if packet.pts is not None}
    return len(times) or len(shown) or None  # the second field of a picture has no time of its own
