import pytest

from server.media.identify import HEAD_BYTES, identify
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
        (picture(kind="GIF"), "video", "image/gif"),
        (picture(kind="WEBP"), "video", "image/webp"),
        (b"\x00\x00\x01\xb3", "video", "video/mpeg"),
        (clip("asf", "wmv2"), "video", "video/x-ms-asf"),
        (clip("mpegts", "mpeg2video", fps=25)[188 * 2 + 100 :], "video", "video/mp2t"),
        (clip("mpegts", "mpeg2video", fps=25, options=(("mpegts_m2ts_mode", "1"),)), "video", "video/mp2t"),
        (b"", "video", None),
    ],
)
def test_files_are_known_by_their_first_bytes(head, kind, mime):
    found = identify(head[:HEAD_BYTES], kind)
    assert (found and found.mime) == mime


def test_a_transport_stream_is_known_by_the_size_of_its_packets():
    blu_ray = clip("mpegts", "mpeg2video", fps=25, options=(("mpegts_m2ts_mode", "1"),))
    assert identify(blu_ray[:HEAD_BYTES], "video").suffix == ".m2ts"
    assert identify(blu_ray[50 : 50 + HEAD_BYTES], "video").suffix == ".m2ts"
    assert identify(b"G" * 100 + b"A" * 924, "video") is None
