"""Whether a file is said to be encrypted: asked of what could not be read, since libav itself rarely tells."""

import os
import re

HEAD_BYTES = 2**20
_PACKET_BYTES = (188, 192, 204)
_SYNC = 0x47
_NULL_PID = 0x1FFF
# The first entry of a sample table's descriptions (ISO/IEC 14496-12, 8.12).
_PROTECTED_VIDEO = re.compile(rb"stsd.{12}encv", re.DOTALL)


def is_encrypted(descriptor: int, demuxer: str) -> bool:
    """Return whether the begin of an MP4 file or a transport stream says that its video is encrypted."""
    head = os.pread(descriptor, HEAD_BYTES, 0)
    if demuxer in ("mp4", "mov"):
        return _PROTECTED_VIDEO.search(head) is not None
    return demuxer == "mpegts" and _is_scrambled(head)


def _is_scrambled(head: bytes) -> bool:
    """Return whether most of a transport stream's packets are scrambled (ISO/IEC 13818-1, 2.4.3.3)."""
    size, begin = next(
        (
            (size, begin)
            for size in _PACKET_BYTES
            for begin in range(size)
            if len(syncs := head[begin : begin + 8 * size : size]) >= 3 and syncs.count(_SYNC) == len(syncs)
        ),
        (0, 0),
    )
    if not size:
        return False
    packets = [head[at : at + 4] for at in range(begin, len(head) - 4, size)]
    carrying = [packet for packet in packets if int.from_bytes(packet[1:3], "big") & _NULL_PID != _NULL_PID]
    return 2 * sum(packet[3] >= 0x80 for packet in carrying) > len(carrying)
