"""Every kind of video that is taken: how many frames it has, how long it lasts, and which frames are read."""

from dataclasses import replace

import pytest
import pytest_asyncio

from server.media.readers import Reader
from server.reader.facts import ReadError
from tests.server.reader.reading import ALL_FRAMES, LIMITS, examine, frames_of
from tests.server.reader.recordings import (
    HEIGHT,
    WIDTH,
    animation,
    encrypted,
    later,
    number_of,
    recording,
    shown_by,
    with_packets_twice,
    without_packet,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def reader():
    reader = Reader(limits=LIMITS, seconds=30, num_workers=1)
    yield reader
    reader.close()


GOP_12, GOP_24 = (("g", "12"),), (("g", "24"),)
FRAGMENTS = "frag_keyframe+default_base_moof"


def broadcast(**options):
    return recording("mpegts", "libx264", 96, 24, encoder=GOP_12, **options)


KINDS = {
    "plain.mp4": (lambda: recording("mp4", "libx264"), 24, 3),
    "av1.mp4": (lambda: recording("mp4", "libsvtav1", encoder=(("preset", "12"),)), 24, 3),
    "hevc.mp4": (lambda: recording("mp4", "libx265"), 24, 3),
    "no_length_vp8.webm": (lambda: recording("webm", "libvpx", 240, 24, options=(("live", "1"),)), 240, 10),
    "no_length_vp9.webm": (lambda: recording("webm", "libvpx-vp9", options=(("live", "1"),)), 24, 3),
    "one_frame.mp4": (lambda: recording("mp4", "libx264", 1), 1, 1 / 8),
    "first_fragment_in_moov.mp4": (
        lambda: recording("mp4", "libx264", 240, 24, encoder=GOP_24, options=(("movflags", FRAGMENTS),)),
        240,
        10,
    ),
    "wholly_fragmented.mp4": (
        lambda: recording(
            "mp4", "libx264", 240, 24, encoder=GOP_24, options=(("movflags", FRAGMENTS + "+empty_moov"),)
        ),
        240,
        10,
    ),
    "starts_at_100_seconds.mkv": (
        lambda: recording("matroska", "libx264", times=tuple(100_000 + 125 * number for number in range(24))),
        24,
        3,
    ),
    "video_with_cover.mp4": (lambda: recording("mp4", "libx264", has_cover=True), 24, 3),
    "sound_longer_than_video.mp4": (lambda: recording("mp4", "libx264", 16, sound_seconds=700), 16, 2),
    "sound_longer_than_video.mkv": (lambda: recording("matroska", "libx264", 16, sound_seconds=30), 16, 2),
    "variable_rate.mkv": (
        lambda: recording("matroska", "libx264", 8, times=(0, 100, 200, 300, 5000, 5100, 9000, 9500)),
        8,
        9.625,
    ),
    "packets_of_192.m2ts": (lambda: recording("mpegts", "libx264", options=(("mpegts_m2ts_mode", "1"),)), 24, 3),
    "elementary.m2v": (lambda: recording("mpeg2video", "mpeg2video", rate=25), 24, 24 / 25),
    "elementary.h264": (lambda: recording("h264", "libx264", 48, 25, encoder=GOP_12), 48, 48 / 25),
    "elementary.h265": (lambda: recording("hevc", "libx265", 48, 25, encoder=GOP_12), 48, 48 / 25),
    "elementary_b_frames.m2v": (
        lambda: recording("mpeg2video", "mpeg2video", 48, rate=25, encoder=(("bf", "2"),)),
        48,
        48 / 25,
    ),
    "program_b_frames.mpg": (
        lambda: recording("mpeg", "mpeg2video", 48, rate=25, encoder=(("bf", "2"),)),
        48,
        48 / 25,
    ),
    "program.mpg": (lambda: recording("mpeg", "mpeg2video", rate=25), 24, 24 / 25),
    "mpeg1.mpg": (lambda: recording("mpeg", "mpeg1video", rate=25), 24, 24 / 25),
    "prores.mov": (lambda: recording("mov", "prores_ks", 8, pix_fmt="yuv422p10le"), 8, 1),
    "wmv.wmv": (lambda: recording("asf", "wmv2"), 24, 3),
    "msmpeg4.wmv": (lambda: recording("asf", "msmpeg4"), 24, 3),
    "h264.flv": (lambda: recording("flv", "libx264"), 24, 3),
    "b_frames.avi": (lambda: recording("avi", "mpeg4", encoder=(("bf", "2"),)), 24, 3),
    "h264_b_frames.avi": (lambda: recording("avi", "libx264"), 24, 3),
    "h264_b_frames_and_keys.avi": (lambda: recording("avi", "libx264", encoder=GOP_12), 24, 3),
    "mjpeg.avi": (lambda: recording("avi", "mjpeg", pix_fmt="yuvj420p"), 24, 3),
    "whole.ts": (lambda: broadcast(), 96, 4),
    "packets_twice.ts": (lambda: with_packets_twice(broadcast()), 96, 4),
    "joined.ts": (lambda: broadcast() + broadcast(options=(("output_ts_offset", "4"),)), 192, 8),
    "joined_where_the_clock_goes_back.ts": (lambda: broadcast() + broadcast(), 192, 8),
    "joined_where_the_clock_leaps.ts": (lambda: broadcast() + later(broadcast(), 3600), 192, 8),
    "clock_wraps.ts": (lambda: later(broadcast(), 2**33 / 90_000 - 3), 96, 4),
}


@pytest.mark.parametrize("name", KINDS)
async def test_a_video_has_as_many_frames_and_seconds_as_are_shown(reader, name):
    make, frames, seconds = KINDS[name]
    facts = await examine(reader, make())
    assert (facts.width, facts.height, facts.frames) == (WIDTH, HEIGHT, frames)
    assert facts.duration_seconds == pytest.approx(seconds, abs=0.011)
    assert facts.fps == pytest.approx(frames / seconds, rel=0.01)


@pytest.mark.parametrize("name", KINDS)
async def test_eight_frames_of_a_video_are_those_that_are_asked_for(reader, name):
    make, frames, seconds = KINDS[name]
    reading, pictures = await frames_of(reader, make())
    header = reading.header
    count = min(8, frames)
    assert header.frames == count
    assert header.frames_indices[0] == 0
    assert header.frames_indices[-1] == frames - 1
    assert (header.total_num_frames, header.source_width, header.source_height) == (frames, WIDTH, HEIGHT)
    assert header.duration == pytest.approx(seconds, abs=0.011)
    of_one_recording = 96 if name.startswith("joined") else frames
    assert [number_of(picture) for picture in pictures] == [i % of_one_recording for i in header.frames_indices]


async def test_an_animation_shows_each_frame(reader):
    data = recording("gif", "gif", pix_fmt="gray")
    facts = await examine(reader, data)
    assert (facts.container, facts.frames, facts.codec) == ("gif", 24, "gif")
    assert facts.duration_seconds == pytest.approx(3, abs=0.05)
    reading, pictures = await frames_of(reader, data, ALL_FRAMES)
    assert [number_of(picture) for picture in pictures] == list(range(24)) == reading.header.frames_indices


async def test_animated_webp_is_a_video(reader):
    data = animation()
    facts = await examine(reader, data)
    assert (facts.container, facts.frames, facts.width, facts.height) == ("webp", 24, WIDTH, HEIGHT)
    assert (facts.duration_seconds, facts.fps) == (3, 8)
    for sampling in (ALL_FRAMES, {"rule": "uniform", "num_frames": 5}):
        reading, pictures = await frames_of(reader, data, sampling)
        assert [number_of(picture) for picture in pictures] == reading.header.frames_indices
    assert (await examine(reader, animation(1))).frames == 1


async def test_animated_webp_that_is_cut_off_is_what_is_left_of_it(reader):
    data = animation()
    ends = [number for number in range(len(data)) if data.startswith(b"ANMF", number)]
    assert len(ends) == 24
    for cut, frames in ((ends[12], 12), (ends[12] + 5, 12), (ends[13] - 1, 12), (ends[1], 1), (len(data) - 1, 23)):
        reading, pictures = await frames_of(reader, data[:cut], ALL_FRAMES)
        assert (reading.facts.frames, reading.facts.duration_seconds) == (frames, frames / 8)
        assert [number_of(picture) for picture in pictures] == list(range(frames))
    for cut in (ends[0], ends[0] + 30, 20, 12):
        with pytest.raises(ReadError, match="truncated or broken"):
            await examine(reader, data[:cut])


async def test_an_animation_is_held_to_the_limits():
    limits = replace(LIMITS, max_pixels=WIDTH * HEIGHT, max_frames=24, max_seconds=3)
    reader = Reader(limits=limits, seconds=30, num_workers=1)
    try:
        assert (await examine(reader, animation())).frames == 24
        with pytest.raises(ReadError, match="have 129 x 64 pixels, at most 8192 are allowed"):
            await examine(reader, animation(2, size=(129, 64)))
        with pytest.raises(ReadError, match="more than 24 frames"):
            await examine(reader, animation(25, 10))
        with pytest.raises(ReadError, match=r"lasts 3\.024 seconds"):
            await examine(reader, animation(24, 126))
    finally:
        reader.close()


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.9])
async def test_a_lost_packet_costs_a_frame_at_most(reader, share):
    data = without_packet(broadcast(), share)
    reading, pictures = await frames_of(reader, data, {"rule": "uniform", "num_frames": 16})
    assert reading.facts.frames in (95, 96)
    assert reading.facts.duration_seconds == pytest.approx(4, abs=0.1)
    numbers = [number_of(picture) for picture in pictures]
    right = sum(abs(number - index) <= 1 for number, index in zip(numbers, reading.header.frames_indices, strict=True))
    assert right >= 13  # what refers to the broken one is broken, up to the next key frame


async def test_a_recording_that_begins_inside_a_packet_begins_with_its_first_key_frame(reader):
    data = broadcast()[188 * 7 + 100 :]
    reading, pictures = await frames_of(reader, data, ALL_FRAMES)
    frames = reading.facts.frames
    assert 80 <= frames < 96
    assert reading.facts.duration_seconds == pytest.approx(frames / 24, abs=0.01)
    assert [number_of(picture) for picture in pictures] == list(range(96 - frames, 96))


@pytest.mark.parametrize(("container", "codec"), [("matroska", "libx264"), ("mp4", "libx264"), ("avi", "mpeg4")])
async def test_a_title_that_is_no_unicode_is_passed_over(reader, container, codec):
    data = recording(container, codec)
    assert b"Lavf" in data
    facts = await examine(reader, data.replace(b"Lavf", b"\xe4\xf6\xfc\xdf"))
    assert facts.frames == 24


async def test_a_cover_picture_is_no_video(reader):
    data = recording("mp4", "", has_video=False, has_cover=True, sound_seconds=3)
    with pytest.raises(ReadError, match="the file holds no video stream"):
        await examine(reader, data)


async def test_an_encrypted_video_is_said_to_be_one(reader):
    data = encrypted(recording("mp4", "libx264", encoder=GOP_12))
    with pytest.raises(ReadError, match="the video is encrypted"):
        await examine(reader, data)


async def test_a_video_that_is_shown_turned_has_its_size_as_shown(reader):
    facts = await examine(reader, shown_by(recording("mp4", "libx264"), 0, 1, -1, 0))
    assert (facts.width, facts.height) == (HEIGHT, WIDTH)
