"""Identifies the type of a file by its first bytes (magic bytes). The sender's claims about the type are ignored."""

from dataclasses import dataclass

from server.media.part import Kind

HEAD_BYTES = 1024


@dataclass(frozen=True)
class FileType:
    """A file type that engines may get: MIME type, file name suffix and, for videos and audio, libav's demuxer."""

    mime: str
    suffix: str
    demuxer: str = ""


MP4 = FileType("video/mp4", ".mp4", "mp4")
QUICKTIME = FileType("video/quicktime", ".mov", "mov")
WEBM = FileType("video/webm", ".webm", "webm")
MATROSKA = FileType("video/x-matroska", ".mkv", "matroska")
TRANSPORT_STREAM = FileType("video/mp2t", ".ts", "mpegts")
BLU_RAY_STREAM = FileType("video/mp2t", ".m2ts", "mpegts")
TAKEN_VIDEOS = "MP4, QuickTime, WebM, Matroska, AVI, MPEG (TS, M2TS, PS, no container), Ogg, FLV, ASF (WMV), GIF, WebP"
TAKEN_IMAGES = "PNG, JPEG, GIF, WebP, BMP"
TAKEN_AUDIO = "WAV, MP3, FLAC, Ogg, M4A"
"""For those who sent something else."""

# What streams without a container begin with: a delimiter, or the first parameter set.
_H264_UNITS = (b"\x09", b"\x27", b"\x67")
_HEVC_UNITS = (b"\x40\x01", b"\x46\x01")

_STARTS: dict[Kind, tuple[tuple[bytes, FileType], ...]] = {
    "video": (
        (b"FLV\x01", FileType("video/x-flv", ".flv", "flv")),
        (b"\x00\x00\x01\xba", FileType("video/mpeg", ".mpg", "mpeg")),
        (b"\x00\x00\x01\xb3", FileType("video/mpeg", ".m2v", "mpegvideo")),  # without a container
        *((b"\x00\x00\x00\x01" + unit, FileType("video/h264", ".h264", "h264")) for unit in _H264_UNITS),
        *((b"\x00\x00\x00\x01" + unit, FileType("video/h265", ".h265", "hevc")) for unit in _HEVC_UNITS),
        (b"OggS", FileType("video/ogg", ".ogv", "ogg")),
        (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", FileType("video/x-ms-asf", ".wmv", "asf")),
        (b"GIF87a", FileType("image/gif", ".gif", "gif")),
        (b"GIF89a", FileType("image/gif", ".gif", "gif")),
    ),
    "image": (
        (b"\x89PNG\r\n\x1a\n", FileType("image/png", ".png")),
        (b"\xff\xd8\xff", FileType("image/jpeg", ".jpg")),
        (b"GIF87a", FileType("image/gif", ".gif")),
        (b"GIF89a", FileType("image/gif", ".gif")),
        (b"BM", FileType("image/bmp", ".bmp")),
    ),
    "audio": (
        (b"ID3", FileType("audio/mpeg", ".mp3", "mp3")),
        (b"\xff\xfb", FileType("audio/mpeg", ".mp3", "mp3")),
        (b"\xff\xf3", FileType("audio/mpeg", ".mp3", "mp3")),
        (b"OggS", FileType("audio/ogg", ".ogg", "ogg")),
        (b"fLaC", FileType("audio/flac", ".flac", "flac")),
    ),
}
_RIFF: dict[tuple[Kind, bytes], FileType] = {
    ("video", b"AVI "): FileType("video/x-msvideo", ".avi", "avi"),
    ("video", b"WEBP"): FileType("image/webp", ".webp", "webp"),
    ("image", b"WEBP"): FileType("image/webp", ".webp"),
    ("audio", b"WAVE"): FileType("audio/wav", ".wav", "wav"),
}
_OTHERS: tuple[tuple[bytes, str], ...] = (
    (b"%PDF", "a PDF document"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"II*\0", "a picture (image/tiff)"),
    (b"MM\0*", "a picture (image/tiff)"),
    (b"\0\0\1\0", "a picture (image/x-icon)"),
)
_TEXTS: tuple[tuple[bytes, str], ...] = (
    *((start, "a playlist") for start in (b"#extm3u", b"ffconcat", b"[playlist]", b"<smil", b"<mpd")),
    *((start, "a web page") for start in (b"<!doctype html", b"<html", b"<head", b"<body", b"<script")),
    (b"<svg", "a picture (image/svg+xml)"),
    *((start, "a JSON document") for start in (b"{", b"[")),
)
_NOUNS: dict[Kind, str] = {"image": "a picture", "video": "a video", "audio": "an audio clip"}
_STILL_BRANDS = (b"heic", b"heix", b"hevc", b"mif1", b"msf1", b"avif", b"avis")
_SOUND_BRANDS = (b"M4A ", b"M4B ")


def identify(head: bytes, kind: Kind) -> FileType | None:
    """Return the type of the file that begins with `head`, or None if engines may not get it as `kind`."""
    if head[:4] == b"RIFF":
        return _RIFF.get((kind, head[8:12]))
    if kind == "video":
        box = _video_container(head)
        if box is not None:
            return box
    if kind == "audio" and head[4:8] == b"ftyp" and head[8:12] in _SOUND_BRANDS:
        return FileType("audio/mp4", ".m4a", "mp4")
    return next((found for start, found in _STARTS[kind] if head.startswith(start)), None)


def name_of(head: bytes) -> str | None:
    """Return what the file that begins with `head` is, with its article, for those who sent it as something else.

    None if that can't be told.
    """
    if head[4:8] == b"ftyp" and head[8:12] in _STILL_BRANDS:
        return f"a picture (image/{'avif' if head[8:11] == b'avi' else 'heic'})"
    for kind, noun in _NOUNS.items():
        found = identify(head, kind)
        if found is not None:
            return f"{noun} ({found.mime})"
    binary = next((name for start, name in _OTHERS if head.startswith(start)), None)
    return binary or _text_of(head)


def _text_of(head: bytes) -> str | None:
    """Return which kind of text begins with `head`, or None if it is no text."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<?xml", b"<!--")):
        return "a playlist" if b"<mpd" in text else "a web page" if b"<html" in text else "an XML document"
    known = next((name for start, name in _TEXTS if text.startswith(start)), None)
    is_text = bool(text) and all(byte >= 0x20 or byte in b"\t\r\n\f" for byte in text)
    return known or ("text" if is_text and text.isascii() else None)


def _video_container(head: bytes) -> FileType | None:
    if head[4:8] == b"ftyp":
        brand = head[8:12]
        if brand in _STILL_BRANDS or brand in _SOUND_BRANDS:
            return None
        return QUICKTIME if brand == b"qt  " else MP4
    if head[4:8] in (b"moov", b"mdat", b"wide"):  # old QuickTime files have no ftyp box
        return QUICKTIME
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return WEBM if b"webm" in head[:64] else MATROSKA
    return _transport_stream(head)


def _transport_stream(head: bytes) -> FileType | None:
    """Return the type of what consists of packets of one size; a recording may begin inside of one."""
    for size, sync_at, found in ((188, 0, TRANSPORT_STREAM), (192, 4, BLU_RAY_STREAM), (204, 0, TRANSPORT_STREAM)):
        if head[sync_at : sync_at + 2 * size + 1 : size] == b"\x47" * 3:
            return found
    for size, found in ((188, TRANSPORT_STREAM), (192, BLU_RAY_STREAM), (204, TRANSPORT_STREAM)):
        if any(head[at::size].count(b"\x47") == len(head[at::size]) >= 5 for at in range(size)):
            return found
    return None
