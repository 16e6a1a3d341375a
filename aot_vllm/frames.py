"""The loader of frames that a gateway hands over: a video that is decoded and sampled already.

Format 1 of a frames file:

- 8 bytes: `AOTFRM1` and a newline;
- 8 bytes: the length of the header, little-endian;
- the header, JSON in UTF-8, padded with spaces so that the frames begin at a multiple of 4096 bytes;
- the frames, N x height x width x 3 bytes, RGB, frame by frame and row by row. With `"compression": "zlib"` they are
  one zlib stream. Nothing follows them.

A file is mapped into memory: nothing is decoded, and the frames are not copied. A mapping outlives the name of its
file. So a file may be deleted or replaced while its frames are in use, but it must not be shortened.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FORMAT = 1
MAGIC = b"AOTFRM1\n"
HEADER_START = len(MAGIC) + 8
"""Where the header begins, in bytes."""

MAX_HEADER_BYTES = 2**20
MAX_FRAMES = 2**14
MAX_SIDE = 2**14
"""Most pixels of a frame in height and in width."""
MAX_INFLATED_BYTES = 2**31
"""Most bytes of frames that arrive compressed. Frames of a file that is mapped have no such limit."""

_MOST_BYTES_PER_DEFLATED_BYTE = 1032
_PIECE_BYTES = 2**18


@dataclass(frozen=True)
class HandedOverVideo:
    """The frames of a video, and what a loader of vLLM tells about them."""

    frames: npt.NDArray[np.uint8]
    """(N, height, width, 3), RGB. Writes change this array alone, never a file."""
    metadata: dict[str, Any]
    """What vLLM calls the metadata of a video. `fps`, in 1/s, and `duration`, in seconds, are those of the whole."""
    identity: bytes
    """40 bytes that stand for the whole file: its content and its metadata."""


def is_frames_file(data: bytes | memoryview) -> bool:
    """Return whether these are the first bytes of a frames file; eight of them decide."""
    return data[: len(MAGIC)] == MAGIC


def read_frames(data: bytes | bytearray | memoryview) -> HandedOverVideo:
    """Return the video of a frames file whose content is `data`. The frames are a copy.

    Raises:
        ValueError: not a frames file, or one that says something else than it holds.
    """
    return _read(memoryview(bytearray(data)))  # writable, as the frames of other loaders are


def map_frames(path: Path) -> HandedOverVideo:
    """Return the video of a frames file, mapped into memory as long as its frames are in use.

    Raises:
        ValueError: not a frames file, or one that says something else than it holds.
        OSError: the file cannot be opened.
    """
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < HEADER_START:
            raise ValueError(f"a frames file must begin with {MAGIC!r} and the length of its header, got fewer bytes")
        # private to this process: whoever writes to the frames changes a copy of the page
        return _read(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)))


def _read(content: memoryview) -> HandedOverVideo:
    """Return the video; its frames are a view of `content` unless they are compressed."""
    header, start = _header(content)
    shape = (header["frames"], header["height"], header["width"], 3)
    size = math.prod(shape)
    stored = content[start:]
    if header["compression"] == "zlib":
        pixels = _inflate(stored, size=size)
    elif len(stored) == size:
        pixels = np.frombuffer(stored, np.uint8)
    else:
        raise ValueError(f"frames of {_text(shape)} must take {size} bytes, got {len(stored)}")
    metadata = {
        "total_num_frames": header["total_num_frames"],
        "fps": float(header["fps"]),
        "duration": float(header["duration"]),
        "video_backend": "aot_frames",
        "frames_indices": header["frames_indices"],
        "do_sample_frames": False,
    }
    return HandedOverVideo(pixels.reshape(shape), metadata, MAGIC + hashlib.sha256(content).digest())


def _header(content: memoryview) -> tuple[dict[str, Any], int]:
    """Return the checked header, and where the frames begin."""
    if not is_frames_file(content):
        raise ValueError(f"a frames file must begin with {MAGIC!r}, got {bytes(content[: len(MAGIC)])!r}")
    length = int.from_bytes(content[len(MAGIC) : HEADER_START], "little")
    most = min(MAX_HEADER_BYTES, max(0, len(content) - HEADER_START))
    if len(content) < HEADER_START or length > most:
        raise ValueError(f"the header of this frames file may have up to {most} bytes, got {length}")
    start = HEADER_START + length
    try:
        header = json.loads(bytes(content[HEADER_START:start]))
    except (ValueError, RecursionError) as exc:
        raise ValueError(f"the header of a frames file must be JSON: {exc}") from exc
    if not isinstance(header, dict):
        raise ValueError(f"the header of a frames file must be a JSON object, got a {type(header).__name__}")
    _check(header)
    return header, start


def _check(header: Mapping[str, Any]) -> None:
    """Raise `ValueError` for the first value in the header that is missing, of another type or out of its range."""
    _one_of(header, "version", (FORMAT,))
    _one_of(header, "compression", (None, "zlib"))
    frames = _integer(header, "frames", most=MAX_FRAMES)
    height, width = (_integer(header, name, most=MAX_SIDE) for name in ("height", "width"))
    if header["compression"] and frames * height * width * 3 > MAX_INFLATED_BYTES:
        raise ValueError(
            f"compressed frames may take up to {MAX_INFLATED_BYTES} bytes, got {_text((frames, height, width, 3))}"
        )
    total = _integer(header, "total_num_frames", most=2**53)
    for name in ("fps", "duration"):
        value = header.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 2**53:
            raise ValueError(f"{name} of a frames file must be a finite number above 0, got {value!r}")
    indices = header.get("frames_indices")
    if not isinstance(indices, list) or len(indices) != frames:
        got = f"{len(indices)}" if isinstance(indices, list) else repr(indices)
        raise ValueError(f"frames_indices of a frames file must be a list of {frames} integers, got {got}")
    for index in indices:
        if type(index) is not int or not 0 <= index < total:
            raise ValueError(f"frames_indices must be integers in [0, {total}), got {index!r}")


def _one_of(header: Mapping[str, Any], name: str, allowed: tuple[object, ...]) -> None:
    value = header.get(name, "nothing")
    if isinstance(value, bool) or value not in allowed:
        raise ValueError(f"{name} of a frames file must be {' or '.join(map(json.dumps, allowed))}, got {value!r}")


def _integer(header: Mapping[str, Any], name: str, *, most: int) -> int:
    value = header.get(name)
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{name} of a frames file must be an integer in [1, {most}], got {value!r}")
    return value


def _inflate(stream: memoryview, *, size: int) -> npt.NDArray[np.uint8]:
    """Return exactly `size` bytes from a zlib stream. Never holds more than these and one piece.

    Raises:
        ValueError: the stream is damaged, has more or fewer bytes, or something follows it.
    """
    if size > _MOST_BYTES_PER_DEFLATED_BYTE * len(stream):
        raise ValueError(f"the frames must inflate to {size} bytes, got {len(stream)} compressed ones")
    inflated = np.empty(size, np.uint8)
    decompressor = zlib.decompressobj()
    filled = taken = 0
    waiting: bytes | memoryview = b""
    while not decompressor.eof:
        if not waiting:
            waiting = stream[taken : taken + _PIECE_BYTES]
            taken += len(waiting)
        try:
            piece = decompressor.decompress(waiting, _PIECE_BYTES)
        except zlib.error as exc:
            raise ValueError(f"the frames must be one zlib stream: {exc}") from exc
        if filled + len(piece) > size:
            raise ValueError(f"the frames must inflate to {size} bytes, got more")
        if not waiting and not piece and not decompressor.eof:
            raise ValueError(f"the frames must inflate to {size} bytes, got a stream that ends after {filled}")
        inflated[filled : filled + len(piece)] = np.frombuffer(piece, np.uint8)
        filled += len(piece)
        waiting = decompressor.unconsumed_tail
    if filled != size:
        raise ValueError(f"the frames must inflate to {size} bytes, got {filled}")
    if behind := len(decompressor.unused_data) + len(stream) - taken:
        raise ValueError(f"nothing may follow the frames, got {behind} bytes")
    return inflated


def _text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
