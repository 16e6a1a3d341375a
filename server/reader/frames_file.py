"""Frames files, format 1: sampled frames of a video as an engine's loader takes them.

A magic, the header's length as a little-endian uint64, the header as JSON padded with spaces to a multiple of 4096
bytes, then the frames: height x width x 3 bytes of RGB each.
"""

import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

MAGIC = b"AOTFRM1\n"
VERSION = 1
PAGE_BYTES = 4096
BYTES_PER_PIXEL = 3
COPY_BYTES = 2**20
_LENGTH = struct.Struct("<Q")
_PREFIX_BYTES = len(MAGIC) + _LENGTH.size


@dataclass(frozen=True)
class FramesHeader:
    """What a frames file says of its frames, and of the video as a whole."""

    frames: int
    height: int
    width: int
    total_num_frames: int
    fps: float
    duration: float
    frames_indices: Sequence[int]
    source_height: int
    source_width: int
    version: int = VERSION
    compression: str | None = None

    @property
    def frame_bytes(self) -> int:
        """What one frame takes."""
        return self.height * self.width * BYTES_PER_PIXEL

    @property
    def pixels_bytes(self) -> int:
        """What all frames take."""
        return self.frames * self.frame_bytes

    def encoded(self, size_bytes: int = 0) -> bytes:
        """Return the begin of the file, up to the first frame; at least `size_bytes`."""
        text = json.dumps(asdict(self)).encode()
        size_bytes = max(size_bytes, -(-(_PREFIX_BYTES + len(text)) // PAGE_BYTES) * PAGE_BYTES)
        length = size_bytes - _PREFIX_BYTES
        return MAGIC + _LENGTH.pack(length) + text.ljust(length)


class FramesFile:
    """A frames file that is being written: frames in any order, at last the header, without which it is none."""

    def __init__(self, descriptor: int, header: FramesHeader) -> None:
        """Make room in an empty file. The header's indices may still change, if none becomes larger than the video."""
        self._descriptor = descriptor
        self.header = header
        largest = replace(header, frames_indices=[header.total_num_frames] * header.frames)
        self._begin = len(largest.encoded())
        os.ftruncate(descriptor, self._begin + header.pixels_bytes)

    @property
    def size_bytes(self) -> int:
        """What the whole file takes."""
        return self._begin + self.header.pixels_bytes

    def write(self, place: int, frame: bytes) -> None:
        """Write the frame at a place."""
        if len(frame) != self.header.frame_bytes:
            raise ValueError(f"a frame must have {self.header.frame_bytes} bytes, got {len(frame)}")
        at, rest = self._begin + place * self.header.frame_bytes, memoryview(frame)
        while rest:
            written = os.pwrite(self._descriptor, rest, at)
            at, rest = at + written, rest[written:]

    def copy(self, source: int, place: int) -> None:
        """Write the frame at one place to another one too."""
        size = self.header.frame_bytes
        self.write(place, os.pread(self._descriptor, size, self._begin + source * size))

    def finish(self, indices: Sequence[int]) -> FramesHeader:
        """Write the header and return it."""
        self.header = replace(self.header, frames_indices=list(indices))
        os.pwrite(self._descriptor, self.header.encoded(self._begin), 0)
        return self.header


def read_header(descriptor: int) -> tuple[FramesHeader, int]:
    """Return the header of a frames file and where its frames begin; raise ValueError if it is none."""
    prefix = os.pread(descriptor, _PREFIX_BYTES, 0)
    if len(prefix) < _PREFIX_BYTES or not prefix.startswith(MAGIC):
        raise ValueError("not a frames file")
    (length,) = _LENGTH.unpack_from(prefix, len(MAGIC))
    return FramesHeader(**json.loads(os.pread(descriptor, length, _PREFIX_BYTES))), _PREFIX_BYTES + length


def compressed(descriptor: int, level: int = 1) -> Iterator[bytes]:
    """Give the same file in pieces, for what is sent inline: its frames compressed, if that halves a piece of them.

    Frames of a camera shrink by a few hundredths, and packing them takes longer than sending them.
    """
    header, at = read_header(descriptor)
    sample = os.pread(descriptor, COPY_BYTES, at + header.pixels_bytes // 2)
    is_packed = 2 * len(zlib.compress(sample, level)) < len(sample)
    packer = zlib.compressobj(level)
    yield replace(header, compression="zlib" if is_packed else None).encoded()
    while piece := os.pread(descriptor, COPY_BYTES, at):
        at += len(piece)
        yield packer.compress(piece) if is_packed else piece
    if is_packed:
        yield packer.flush()
