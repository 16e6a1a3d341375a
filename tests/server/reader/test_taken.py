"""The table of docs/media.md: each pair of container and codec that it says is taken is made and read."""

import re
from pathlib import Path

import pytest
import pytest_asyncio

from server.errors import MediaRefused
from server.media.examine import type_of
from server.media.file import in_memory
from server.media.readers import Reader
from server.reader.facts import ReadError
from server.reader.opening import VIDEO_CODECS
from tests.server.reader.reading import ALL_FRAMES, LIMITS, examine, frames_of
from tests.server.reader.recordings import animation, encrypted, number_of, recording

pytestmark = pytest.mark.asyncio(loop_scope="module")

PAGE = Path(__file__).resolve().parents[3] / "docs" / "media.md"
FRAMES = 8
ENCODERS = {
    "H.264": {"codec": "libx264"},
    "HEVC": {"codec": "libx265"},
    "AV1": {"codec": "libsvtav1", "encoder": (("preset", "12"),)},
    "VP8": {"codec": "libvpx"},
    "VP9": {"codec": "libvpx-vp9"},
    "MPEG-1": {"codec": "mpeg1video", "rate": 25},
    "MPEG-2": {"codec": "mpeg2video", "rate": 25},
    "MPEG-4": {"codec": "mpeg4"},
    "MS MPEG-4": {"codec": "msmpeg4"},
    "MS MPEG-4 v2": {"codec": "msmpeg4v2"},
    "H.263": {"codec": "h263", "size": (176, 144)},
    "FLV1": {"codec": "flv"},
    "ProRes": {"codec": "prores_ks", "pix_fmt": "yuv422p10le"},
    "Motion JPEG": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "WMV1": {"codec": "wmv1"},
    "WMV2": {"codec": "wmv2"},
    "GIF": {"codec": "gif", "pix_fmt": "gray"},
    "FFV1": {"codec": "ffv1"},
    "HuffYUV": {"codec": "huffyuv", "pix_fmt": "yuv422p"},
    "Cinepak": {"codec": "cinepak", "pix_fmt": "rgb24"},
}
MUXERS = {
    "MP4": "mp4",
    "QuickTime": "mov",
    "WebM": "webm",
    "Matroska": "matroska",
    "AVI": "avi",
    "MPEG transport stream": "mpegts",
    "MPEG program stream": "mpeg",
    "Ogg": "ogg",
    "FLV": "flv",
    "ASF (WMV)": "asf",
    "GIF": "gif",
    "3GP": "3gp",
}
RAW_MUXERS = {"H.264": "h264", "HEVC": "hevc", "MPEG-1": "mpeg1video", "MPEG-2": "mpeg2video"}
FOREIGN = {"IVF": ("ivf", "VP8"), "MXF": ("mxf", "MPEG-2"), "YUV4MPEG": ("yuv4mpegpipe", None)}
CODECS_WITHOUT_ENCODER = {"theora", "vc1", "wmv3"}


def rows():
    """Return the table's rows by file: its codecs, whether it is taken, and the remarks."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {file: (codecs.split(", "), taken == "yes", remarks) for file, codecs, taken, remarks in cells}


ROWS = rows()
TAKEN = [(file, codec) for file, (codecs, taken, _) in ROWS.items() for codec in codecs if taken]


def made(muxer, codec):
    return recording(muxer, frames=FRAMES, **ENCODERS[codec])


def file_of(file, codec):
    if file == "WebP":
        return animation(FRAMES)
    return made(RAW_MUXERS[codec] if file == "Stream without a container" else MUXERS[file], codec)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def reader():
    reader = Reader(limits=LIMITS, seconds=30, num_workers=1)
    yield reader
    reader.close()


def type_in(data):
    with in_memory(max_bytes=10**8) as file:
        file.write(data)
        return type_of(file.descriptor(), "video")


@pytest.mark.parametrize(("file", "codec"), TAKEN)
async def test_what_is_said_to_be_taken_is_read(reader, file, codec):
    data = file_of(file, codec)
    reading, pictures = await frames_of(reader, data, ALL_FRAMES, demuxer=type_in(data).demuxer)
    assert reading.facts.frames == FRAMES
    assert [number_of(picture) for picture in pictures] == list(range(FRAMES))


async def test_every_codec_that_is_taken_is_in_the_table(reader):
    seen = {(await examine(reader, file_of(file, codec))).codec for file, codec in TAKEN}
    assert seen - {"webp"} == set(VIDEO_CODECS) - CODECS_WITHOUT_ENCODER
    page = PAGE.read_text(encoding="utf-8")
    assert all(name in page for name in ("Theora", "VC-1", "WMV3"))


async def test_encrypted_video_is_not_taken(reader):
    (words,) = re.findall('"(.+?)"', ROWS["Encrypted video"][2])
    with pytest.raises(ReadError, match=words):
        await examine(reader, encrypted(recording("mp4", "libx264", encoder=(("g", "12"),))))


@pytest.mark.parametrize("codec", ROWS["Another codec"][0])
async def test_another_codec_is_not_taken(reader, codec):
    (words,) = re.findall('"(.+?)"', ROWS["Another codec"][2])
    begin, end = words.split("…; ")
    with pytest.raises(ReadError, match=f"{begin}.+; {end.rstrip('…')}"):
        await examine(reader, made("avi", codec))


async def test_sound_alone_is_not_taken(reader):
    (words,) = re.findall('"(.+?)"', ROWS["Sound alone"][2])
    for has_cover in (False, True):
        with pytest.raises(ReadError, match=words):
            await examine(reader, recording("mp4", "", has_video=False, has_cover=has_cover, sound_seconds=1))


@pytest.mark.parametrize("file", ROWS["Another container"][0])
async def test_another_container_is_not_taken(file):
    (words,) = re.findall('"(.+?)"', ROWS["Another container"][2])
    muxer, codec = FOREIGN[file]
    data = recording(muxer, "rawvideo", frames=FRAMES, rate=25) if codec is None else made(muxer, codec)
    with pytest.raises(MediaRefused, match=words):
        type_in(data)


async def test_a_segment_without_its_header_is_not_taken(reader):
    options = (("movflags", "frag_keyframe+empty_moov+default_base_moof"),)
    data = recording("mp4", "libx264", options=options)
    segment = data[data.index(b"moof") - 4 :]
    assert not ROWS["Segment without its header"][1]
    with pytest.raises(MediaRefused):
        type_in(segment)
