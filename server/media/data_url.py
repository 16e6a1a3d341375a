"""Reads data URLs (RFC 2397) as browsers and libraries write them: with parameters, wrapped lines, missing padding."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

import pybase64

from server.errors import MediaRefused
from server.media.file import MediaFile
from server.media.part import Kind

MAX_HEAD_CHARACTERS: Final = 512
PIECE_CHARACTERS: Final = 2**20  # decoded at a time; a multiple of four, as base64 is decoded in groups of four
_HEAD = re.compile(r"data:\s*([^;,\s]*)[^\x00-\x1f]*?;\s*base64\s*,", re.IGNORECASE)
_GENERAL_LABELS: Final = frozenset(
    {
        *("application/octet-stream", "binary/octet-stream", "application/binary", "application/x-binary"),
        *("application/unknown", "application/force-download", "application/mp4", "application/ogg"),
        *("application/x-matroska", "application/vnd.ms-asf", "text/plain", "*/*"),  # text/plain: RFC 2397's default
    }
)
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):", re.IGNORECASE)
_PATH = re.compile(r"(?:[/~\\]|\.{1,2}/|[a-z]:[\\/])[^\n]*|[^:\n]*\.[a-z0-9]{2,5}", re.IGNORECASE)
_BARE_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]{16,}={0,2}\s*")
_LONGEST_PATH: Final = 100  # characters; what is longer and consists of digits of base64 is base64
_ALPHABET: Final = bytes.maketrans(b"-_", b"+/")  # the URL-safe digits
_SPACES: Final = b" \t\r\n\f"
_ESCAPES: Final = tuple(
    (escape, character)
    for character in (b"+", b"/", b"=", b"-", b"_", b"\n", b"\r", b"\t", b" ")
    for escape in {b"%%%02X" % character[0], b"%%%02x" % character[0]}
)
"""What is escaped in base64; letters and digits never are. Each is replaced at once, however often it occurs."""
_HELD_BACK: Final = 4  # digits at the end of a piece that may be the last ones, with padding or without
_MOST_PADDING: Final = 2


@dataclass(frozen=True)
class DataHead:
    """The part of a data URL before its data."""

    label: str
    """The MIME type that it names, in lower case. Empty if it names none, or one that says nothing."""
    begin: int
    """Where the data begin."""

    def contradicts(self, kind: str) -> bool:
        """Return whether the label names another kind of content than `kind`, such as `image` or `video`."""
        return bool(self.label) and self.label.partition("/")[0] != kind


def read_head(url: str, kind: Kind) -> DataHead:
    """Return the head of a data URL; raise MediaRefused if it does not announce base64."""
    found = _HEAD.match(url[:MAX_HEAD_CHARACTERS])
    if found is None:
        raise MediaRefused(
            f"the {kind}'s data URL must begin with data:{kind}/<type>;base64, and go on with base64",
            code="invalid_media_url",
        )
    label = found[1].lower()
    is_general = label in _GENERAL_LABELS or "/" not in label
    return DataHead("" if is_general else label, found.end())


def what_to_send(value: str, kind: Kind) -> str:
    """Return the complaint about a value that is neither an https nor a data URL, with what to send in its place."""
    begin = value[:MAX_HEAD_CHARACTERS]
    scheme = _SCHEME.match(begin)
    take = f"an https URL or a data URL, data:{kind}/<type>;base64,<base64>"
    if not begin.strip():
        return f"the {kind} URL is empty: send {take}"
    is_base64 = bool(_BARE_BASE64.fullmatch(begin)) and (len(begin) >= _LONGEST_PATH or not begin.startswith("/"))
    if is_base64:
        return f"the {kind} URL is base64 without a head: put data:{kind}/<type>;base64, before it"
    if (scheme and scheme[1].lower() == "file") or _PATH.match(begin):
        ways = " or upload it (POST /v1/files) and send its id in a file part" if kind == "video" else ""
        return f"the {kind} URL is a path, and this gateway reads no files of clients: send {take},{ways}".rstrip(",")
    if scheme:
        return f"the {kind} URL begins with {scheme[1][:20]}: and this gateway takes no such URLs; send {take}"
    return f"the {kind} URL is none: send {take}"


def decode(data: str | memoryview, begin: int, file: MediaFile, kind: Kind) -> bool:
    """Decode the base64 in `data` from `begin` on into `file`, in pieces that bound the memory.

    Returns whether every strict decoder reads the same from these characters. If not, because of spaces, percent
    signs, URL-safe digits or missing padding, others may get only the content, encoded anew.
    Raises MediaRefused if the characters are not base64.
    """
    for pieces, is_strict in ((_strictly_decoded, True), (_decoded, False)):
        try:
            if len(data) - begin > PIECE_CHARACTERS:
                file.write_all(partial(pieces, data, begin))
            else:
                for piece in pieces(data, begin):
                    file.write(piece)
        except ValueError:  # also raised for characters outside ASCII
            file.clear()
        else:
            return is_strict
    raise MediaRefused(f"the {kind}'s data is not valid base64", code="invalid_media_url") from None


def _strictly_decoded(data: str | memoryview, begin: int) -> Iterator[bytes]:
    for at in range(begin, len(data), PIECE_CHARACTERS):
        content = pybase64.b64decode(data[at : at + PIECE_CHARACTERS], validate=True)
        if len(content) < PIECE_CHARACTERS // 4 * 3 and at + PIECE_CHARACTERS < len(data):
            raise ValueError("padding before the end")
        yield content


def _decoded(data: str | memoryview, begin: int) -> Iterator[bytes]:
    escaped = digits = b""
    for at in range(begin, len(data), PIECE_CHARACTERS):
        piece = data[at : at + PIECE_CHARACTERS]
        escaped += piece.encode("ascii") if isinstance(piece, str) else bytes(piece)
        cut = len(escaped)
        if b"%" in escaped[-2:]:  # the rest of the escape is in the next piece
            cut = escaped.rindex(b"%")
        digits += _unescaped(escaped[:cut]).translate(_ALPHABET, _SPACES)
        escaped = escaped[cut:]
        whole = max(0, (len(digits) - _HELD_BACK) // 4 * 4)
        content = pybase64.b64decode(digits[:whole], validate=True)
        if len(content) != whole // 4 * 3:
            raise ValueError("padding before the end")
        digits = digits[whole:]
        yield content
    last = digits.rstrip(b"=")
    if escaped or len(digits) - len(last) > _MOST_PADDING:
        raise ValueError("not base64")
    yield pybase64.b64decode(last + b"=" * (-len(last) % 4), validate=True)


def _unescaped(escaped: bytes) -> bytes:
    if b"%" in escaped:
        for escape, character in _ESCAPES:
            escaped = escaped.replace(escape, character)
    return escaped
