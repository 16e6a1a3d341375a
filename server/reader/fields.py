"""H.264 whose frames come as two fields, each in a packet of its own (ITU-T H.264, 7.3): cameras record so."""

import re
from typing import NamedTuple

_UNIT = re.compile(b"\0\0\1(.)", re.DOTALL)
_SLICE, _IDR_SLICE, _SEQUENCE = 1, 5, 7
_HEADER_BYTES = 64  # of a slice or of a sequence parameter set, up to what is read of it
_SETS_BYTES = 1024  # a set with scaling lists may be longer
_WITH_CHROMA_FORMAT = (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135)  # profiles, 7.3.2.1.1
_RGB = 3


class _Sequence(NamedTuple):
    """What of a sequence parameter set is needed to read the headers of slices."""

    has_planes: bool
    frame_num_bits: int
    has_fields: bool


class _Field(NamedTuple):
    frame_num: int
    is_bottom: bool


class Fields:
    """Tells the second field of a frame from what begins one, packet by packet, in a stream with start codes."""

    def __init__(self, extradata: bytes | None) -> None:
        """Take the parameter sets that stand before the first packet."""
        self._sequence: _Sequence | None = None
        self._first: _Field | None = None
        self._learn(extradata or b"")

    def is_rest(self, packet: bytes) -> bool:
        """Return whether a packet is the second field of the frame that the packet before began."""
        if self._sequence is None or b"\0\0\1\x67" in packet or b"\0\0\1\x27" in packet or b"\0\0\1\x47" in packet:
            self._learn(packet)
        if self._sequence is None or not self._sequence.has_fields:
            return False
        field, first = self._field(packet), self._first
        if first is not None and field == _Field(first.frame_num, not first.is_bottom):
            self._first = None
            return True
        self._first = field
        return False

    def _learn(self, data: bytes) -> None:
        for found in _UNIT.finditer(data):
            if found[1][0] & 31 == _SEQUENCE:
                try:
                    self._sequence = _sequence(_Bits(data[found.end() : found.end() + _SETS_BYTES]))
                except IndexError:  # a broken one
                    continue

    def _field(self, packet: bytes) -> _Field | None:
        """Return which field a packet's first slice is of; None for a whole frame."""
        sequence = self._sequence
        for found in _UNIT.finditer(packet):
            if sequence is not None and found[1][0] & 31 in (_SLICE, _IDR_SLICE):
                try:
                    return _slice_field(_Bits(packet[found.end() : found.end() + _HEADER_BYTES]), sequence)
                except IndexError:
                    return None
        return None


class _Bits:
    """Reads numbers bit by bit; raises IndexError at the end."""

    def __init__(self, data: bytes) -> None:
        self._bits = "".join(f"{byte:08b}" for byte in data.replace(b"\0\0\3", b"\0\0"))
        self._at = 0

    def number(self, bits: int) -> int:
        """A number of so many bits: u(n)."""
        begin, self._at = self._at, self._at + bits
        if self._at > len(self._bits):
            raise IndexError
        return int(self._bits[begin : self._at], 2) if bits else 0

    def flag(self) -> bool:
        return bool(self.number(1))

    def counted(self) -> int:
        """A number behind as many zeros as it has bits after the first: ue(v)."""
        zeros = 0
        while not self.flag():
            zeros += 1
        return (1 << zeros) - 1 + self.number(zeros)

    def signed(self) -> int:
        """A number that may be negative: se(v)."""
        code = self.counted()
        return (code + 1) // 2 if code % 2 else -code // 2


def _sequence(bits: _Bits) -> _Sequence:
    profile = bits.number(8)
    bits.number(16)  # constraints and level
    bits.counted()  # its own number
    has_planes = profile in _WITH_CHROMA_FORMAT and _has_planes(bits)
    frame_num_bits = bits.counted() + 4
    order = bits.counted()
    if order == 0:
        bits.counted()
    elif order == 1:
        bits.flag()
        for _ in range(2):
            bits.signed()
        for _ in range(bits.counted()):
            bits.signed()
    bits.counted()  # reference frames
    bits.flag()
    for _ in range(2):  # width and height
        bits.counted()
    return _Sequence(has_planes, frame_num_bits, has_fields=not bits.flag())


def _has_planes(bits: _Bits) -> bool:
    """Return whether the three colours are coded one by one; read on to the end of the scaling lists."""
    chroma = bits.counted()
    has_planes = chroma == _RGB and bits.flag()
    for _ in range(2):  # the depths
        bits.counted()
    bits.flag()
    if bits.flag():
        for number in range(12 if chroma == _RGB else 8):
            if bits.flag():
                _skip_scaling_list(bits, 16 if number < 6 else 64)
    return has_planes


def _skip_scaling_list(bits: _Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            following = (last + bits.signed()) % 256
        last = following or last


def _slice_field(bits: _Bits, sequence: _Sequence) -> _Field | None:
    for _ in range(3):  # the first macroblock, the type, the picture parameter set
        bits.counted()
    if sequence.has_planes:
        bits.number(2)
    frame_num = bits.number(sequence.frame_num_bits)
    return _Field(frame_num, bits.flag()) if sequence.has_fields and bits.flag() else None
