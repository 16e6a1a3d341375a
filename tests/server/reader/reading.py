"""Reads media with a reader's worker, as the gateway does."""

import os

import numpy as np

from server.media.file import in_memory
from server.media.identify import HEAD_BYTES, identify
from server.reader.facts import Limits
from server.reader.frames_file import read_header
from server.reader.wanted import Wanted

LIMITS = Limits(max_seconds=600, max_pixels=3840 * 2160, max_frames=100_000, sampled_frames=32)
ALL_FRAMES = {"rule": "uniform", "num_frames": -1}
EIGHT_FRAMES = {"rule": "uniform", "num_frames": 8}
MAX_BYTES = 2**28


async def examine(reader, data, demuxer=None, kind="video"):
    with in_memory(max_bytes=10**8) as file:
        file.write(data)
        return await reader.examine(
            file.descriptor(), kind=kind, demuxer=demuxer or identify(data[:HEAD_BYTES], kind).demuxer
        )


async def frames_of(reader, data, sampling=EIGHT_FRAMES, *, demuxer=None, max_bytes=MAX_BYTES, **wanted):
    """Return what was read of a video and its frames, from the frames file."""
    into = os.memfd_create("frames")
    try:
        with in_memory(max_bytes=10**8) as file:
            file.write(data)
            reading = await reader.read(
                file.descriptor(),
                demuxer=demuxer or identify(data[:HEAD_BYTES], "video").demuxer,
                wanted=Wanted(sampling=sampling, max_bytes=max_bytes, **wanted),
                into=into,
            )
        return reading, pixels_in(into)
    finally:
        os.close(into)


def pixels_in(descriptor):
    """Return the frames in a frames file, which must be sound."""
    header, begin = read_header(descriptor)
    assert begin % 4096 == 0
    assert os.fstat(descriptor).st_size == begin + header.pixels_bytes
    assert len(header.frames_indices) == header.frames >= 1
    assert (header.version, header.compression) == (1, None)
    shape = header.frames, header.height, header.width, 3
    return np.frombuffer(os.pread(descriptor, header.pixels_bytes, begin), np.uint8).reshape(shape)
