import pytest

from server.media.identify import identify
from tests.server.clips import clip, picture, sound


@pytest.mark.parametrize(
    ("head", "kind", "mime"),
    [
        (clip(), "video", "video/mp4"),
        (clip("mov"), "video", "video/quicktime"),
        (clip("webm", "vp8"), "video", "video/webm"),
        (clip("matroska"), "video", "video/x-matroska"),
        (clip("avi"), "video", "video/x-msvideo"),
        (clip("mpegts", "mpeg2video", fps=25), "video", "video/mp2t"),
        (b"\0\0\0\x08wide\0\0", "video", "video/quicktime"),
        (picture(), "image", "image/png"),
        (b"\xff\xd8\xff\xe0", "image", "image/jpeg"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "image", "image/webp"),
        (sound(), "audio", "audio/wav"),
        (b"ID3\x04", "audio", "audio/mpeg"),
        (b"\0\0\0\x20ftypM4A ", "audio", "audio/mp4"),
        (picture(), "video", None),
        (sound(), "video", None),
        (clip(), "image", None),
        (clip(), "audio", None),
        (b"\0\0\0\x20ftypheic", "video", None),
        (b"\0\0\0\x20ftypM4A ", "video", None),
        (b"#EXTM3U\n#EXT-X-VERSION:3\n", "video", None),
        (b"ffconcat version 1.0\nfile /etc/passwd", "video", None),
        (b"<html>", "video", None),
        (b"GIF89a", "video", None),
        (b"", "video", None),
    ],
)
def test_files_are_known_by_their_first_bytes(head, kind, mime):
    found = identify(head[:512], kind)
    assert (found and found.mime) == mime
