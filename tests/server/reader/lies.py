"""Files with false headers."""

import struct


def patched(data: bytes, box: bytes, offset: int, layout: str, *values: int) -> bytes:
    """Return `data` with `values` written `offset` bytes after the name of the first box called `box`."""
    at = data.index(box) + len(box) + offset
    changed = bytearray(data)
    struct.pack_into(layout, changed, at, *values)
    return bytes(changed)


def claims_frames(mp4: bytes, frames: int) -> bytes:
    """The video with a sample table that claims `frames` samples of one size."""
    return patched(mp4, b"stsz", 4, ">II", 1, frames)


def claims_rate(mp4: bytes, per_second: int) -> bytes:
    """The video with one tick per frame, and `per_second` ticks per second."""
    return patched(patched(mp4, b"stts", 12, ">I", 1), b"mdhd", 12, ">I", per_second)


def claims_duration(mp4: bytes, ticks: int) -> bytes:
    """The video with a duration of `ticks` in the headers of the file, the track and the medium."""
    return patched(patched(patched(mp4, b"mvhd", 16, ">I", ticks), b"tkhd", 20, ">I", ticks), b"mdhd", 16, ">I", ticks)


def with_edits(mp4: bytes, edits: list[tuple[int, int]]) -> bytes:
    """The video with another edit list. An edit is its duration in file ticks, and its start in media ticks."""
    at = mp4.index(b"elst") - 4
    (old_size,) = struct.unpack_from(">I", mp4, at)
    body = struct.pack(">II", 0, len(edits)) + b"".join(struct.pack(">IiI", d, t, 0x10000) for d, t in edits)
    new = struct.pack(">I", 8 + len(body)) + b"elst" + body
    grown = bytearray(mp4[:at] + new + mp4[at + old_size :])
    for name in (b"moov", b"trak", b"edts"):
        where = grown.index(name) - 4
        struct.pack_into(">I", grown, where, struct.unpack_from(">I", grown, where)[0] + len(new) - old_size)
    return bytes(grown)
