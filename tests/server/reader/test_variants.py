"""Two thousand damaged videos of every format that is taken: each is read or refused with words, and ends nothing."""

import asyncio
import os
import random

import pytest
import pytest_asyncio

from server.media.identify import identify
from server.media.readers import Reader
from server.reader.facts import ReadError
from server.reader.wanted import Reading
from tests.server.reader import fields
from tests.server.reader.reading import EIGHT_FRAMES, LIMITS, MAX_BYTES, frames_of
from tests.server.reader.recordings import animation, recording
from tests.server.reader.test_fuzz import damaged

pytestmark = pytest.mark.asyncio(loop_scope="module")

VARIANTS = 2000
GOP = (("g", "8"),)
FRAGMENTS = (("movflags", "frag_keyframe+empty_moov+default_base_moof"),)
FORMATS = {
    "mp4 h264": lambda: recording("mp4", "libx264", encoder=GOP),
    "mp4 hevc": lambda: recording("mp4", "libx265", encoder=GOP),
    "mp4 av1": lambda: recording("mp4", "libsvtav1", encoder=(("preset", "12"),)),
    "mp4 mpeg4": lambda: recording("mp4", "mpeg4"),
    "mp4 fragments": lambda: recording("mp4", "libx264", encoder=GOP, options=FRAGMENTS),
    "mov prores": lambda: recording("mov", "prores_ks", 8, pix_fmt="yuv422p10le"),
    "webm vp8": lambda: recording("webm", "libvpx"),
    "webm vp9": lambda: recording("webm", "libvpx-vp9", options=(("live", "1"),)),
    "mkv h264": lambda: recording("matroska", "libx264", encoder=GOP),
    "mkv hevc": lambda: recording("matroska", "libx265", encoder=GOP),
    "avi mpeg4": lambda: recording("avi", "mpeg4"),
    "avi mjpeg": lambda: recording("avi", "mjpeg", pix_fmt="yuvj420p"),
    "ts h264": lambda: recording("mpegts", "libx264", encoder=GOP),
    "ts mpeg2": lambda: recording("mpegts", "mpeg2video", rate=25),
    "ts h264 in fields": lambda: fields.transport_stream(6),
    "m2ts h264": lambda: recording("mpegts", "libx264", encoder=GOP, options=(("mpegts_m2ts_mode", "1"),)),
    "mpg mpeg1": lambda: recording("mpeg", "mpeg1video", rate=25),
    "mpg mpeg2": lambda: recording("mpeg", "mpeg2video", rate=25),
    "h264": lambda: recording("h264", "libx264", encoder=GOP),
    "hevc": lambda: recording("hevc", "libx265", encoder=GOP),
    "m2v": lambda: recording("mpeg2video", "mpeg2video", rate=25),
    "flv h264": lambda: recording("flv", "libx264", encoder=GOP),
    "wmv": lambda: recording("asf", "wmv2"),
    "gif": lambda: recording("gif", "gif", pix_fmt="gray"),
    "webp": lambda: animation(12),
}
EACH = VARIANTS // len(FORMATS)
AT_ONCE = 8


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def reader():
    reader = Reader(limits=LIMITS, seconds=10, num_workers=os.cpu_count() or 1)
    yield reader
    reader.close()


async def outcome_of(reader, data, demuxer):
    """Return what was read, having looked at the frames file, or the refusal."""
    try:
        reading, pictures = await frames_of(reader, data, EIGHT_FRAMES, demuxer=demuxer)
    except ReadError as exc:
        return exc
    facts, header = reading.facts, reading.header
    assert len(pictures) == header.frames == min(8, facts.frames)
    assert header.pixels_bytes <= MAX_BYTES
    assert all(0 <= index < facts.frames for index in header.frames_indices)
    assert facts.frames <= LIMITS.max_frames
    assert 0 < facts.duration_seconds <= LIMITS.max_seconds
    assert 0 < facts.width * facts.height <= LIMITS.max_pixels
    return reading


async def outcomes_of(reader, name, cases):
    seed, chance = FORMATS[name](), random.Random(f"variants of {name}")  # the same every time
    demuxer = identify(seed[:1024], "video").demuxer
    assert isinstance(await outcome_of(reader, seed, demuxer), Reading)
    slots = asyncio.Semaphore(AT_ONCE)

    async def one():
        data = damaged(seed, chance) or b"\0"
        async with slots:
            return await outcome_of(reader, data, demuxer)

    outcomes = await asyncio.gather(*(one() for _ in range(cases)))
    assert isinstance(await outcome_of(reader, seed, demuxer), Reading)
    return outcomes


def assert_read_or_refused(outcomes):
    for outcome in outcomes:
        if not isinstance(outcome, Reading):
            assert str(outcome).startswith(("the video", "the file", "only "))
            assert "its reader" not in str(outcome)  # which neither broke nor failed to start


@pytest.mark.parametrize("name", FORMATS)
async def test_a_damaged_video_of_any_format_is_read_or_refused(reader, name):
    assert_read_or_refused(await outcomes_of(reader, name, 5))


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
async def test_two_thousand_damaged_videos_are_read_or_refused(reader, name):
    outcomes = await outcomes_of(reader, name, EACH)
    assert len(outcomes) == EACH
    assert_read_or_refused(outcomes)
    assert any(isinstance(outcome, Reading) for outcome in outcomes)
    assert any(isinstance(outcome, ReadError) for outcome in outcomes)


async def test_there_are_enough_of_them():
    assert len(FORMATS) >= 20
    assert EACH * len(FORMATS) >= VARIANTS
