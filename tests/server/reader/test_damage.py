"""Videos that are cut off or damaged: judged by what can be decoded of them."""

import asyncio
import io
import random

import av
import numpy as np
import pytest
import pytest_asyncio

from server.media.identify import identify
from server.media.readers import Reader
from server.reader.facts import Facts, ReadError
from server.reader.wanted import Reading
from tests.server.reader.reading import ALL_FRAMES, EIGHT_FRAMES, LIMITS, MAX_BYTES, examine, frames_of
from tests.server.reader.recordings import number_of, recording
from tests.server.reader.test_fuzz import KINDS, SEEDS, damaged

pytestmark = pytest.mark.asyncio(loop_scope="module")

CASES_PER_FILE = 20
GOP_12 = (("g", "12"), ("bf", "0"))
AT_THE_BEGIN = (("moov_size", "8192"),)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def reader():
    reader = Reader(limits=LIMITS, seconds=10, num_workers=2)
    yield reader
    reader.close()


def with_noise(data, begin, end, seed=7):
    """The same with each byte of a part of it changed."""
    changed = bytearray(data)
    changed[begin:end] = np.random.default_rng(seed).bytes(end - begin)
    return bytes(changed)


def places(data):
    """Where in a file each frame's packet is."""
    with av.open(io.BytesIO(data)) as source:
        return [(packet.pos, packet.size) for packet in source.demux(video=0) if packet.size]


async def test_a_video_that_is_cut_off_late_is_what_is_left_of_it(reader):
    data = recording("mp4", "libx264", 96, 24, encoder=GOP_12, options=AT_THE_BEGIN)
    at, size = places(data)[80]
    reading, pictures = await frames_of(reader, data[: at + size])
    assert reading.facts.frames == 81
    assert reading.facts.duration_seconds == pytest.approx(81 / 24)
    assert [number_of(picture) for picture in pictures] == reading.header.frames_indices


async def test_a_video_of_which_most_is_cut_off_is_refused(reader):
    data = recording("mp4", "libx264", 96, 24, encoder=GOP_12, options=AT_THE_BEGIN)
    at, size = places(data)[30]
    with pytest.raises(ReadError, match="the video is truncated: 31 of its 96 frames are there"):
        await examine(reader, data[: at + size])


@pytest.mark.parametrize("share", [0.4, 0.6, 0.8])
@pytest.mark.parametrize(("container", "codec"), [("matroska", "libx264"), ("webm", "libvpx"), ("mpegts", "libx264")])
async def test_a_stream_without_a_table_that_is_cut_off_is_what_is_left_of_it(reader, container, codec, share):
    data = recording(container, codec, 96, 24, encoder=GOP_12)
    reading, pictures = await frames_of(reader, data[: int(len(data) * share)])
    assert 96 * share * 0.4 < reading.facts.frames < 96
    numbers = [number_of(picture) for picture in pictures]
    wrong = [number for number, index in zip(numbers, reading.header.frames_indices, strict=True) if number != index]
    assert len(wrong) <= 1  # the last is cut off


async def test_a_frame_that_cannot_be_decoded_is_replaced_by_the_next_that_can(reader):
    data = recording("matroska", "mpeg4", 24, 8, encoder=(("g", "1"),))
    broken = data
    for number in (0, 9, 10, 23):
        at, size = places(data)[number]
        at = data.index(b"\0\0\1\xb6", at)
        broken = broken[:at] + b"\xff" * min(12, size) + broken[at + min(12, size) :]
    sampling = {"rule": "uniform", "num_frames": 8}  # 0 3 6 9 13 16 19 23
    reading, pictures = await frames_of(reader, broken, sampling)
    assert reading.facts.frames == 24
    assert reading.header.frames_indices == [1, 3, 6, 11, 13, 16, 19, 19]
    assert [number_of(picture) for picture in pictures] == [1, 3, 6, 11, 13, 16, 19, 19]


async def test_a_video_of_which_most_is_broken_is_refused(reader):
    data = recording("matroska", "mpeg4", 24, 8, encoder=(("g", "1"),))
    broken = data
    for number in range(2, 20):
        at, size = places(data)[number]
        at = data.index(b"\0\0\1\xb6", at)
        broken = broken[:at] + b"\xff" * min(12, size) + broken[at + min(12, size) :]
    with pytest.raises(ReadError, match="only 2 of the video's 8 sampled frames can be decoded"):
        await frames_of(reader, broken, EIGHT_FRAMES)


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libvpx", "libvpx-vp9"])
async def test_noise_in_the_middle_ends_nothing(reader, codec):
    data = recording("matroska", codec, 96, 24, encoder=GOP_12)
    at, size = places(data)[50]
    reading, pictures = await frames_of(reader, with_noise(data, at + size // 2, at + size), EIGHT_FRAMES)
    assert reading.facts.frames == 96
    numbers = [number_of(picture) for picture in pictures]
    assert numbers[:3] == reading.header.frames_indices[:3]
    assert numbers[-2:] == reading.header.frames_indices[-2:]


@pytest.mark.parametrize("name", [name for name in SEEDS if name not in KINDS])
async def test_a_damaged_video_is_read_or_refused(reader, name):
    chance = random.Random(f"read {name}")  # the same files every time
    demuxer = identify(SEEDS[name][:1024], "video").demuxer

    async def read(data):
        try:
            reading, pictures = await frames_of(reader, data, EIGHT_FRAMES, demuxer=demuxer)
        except ReadError as exc:
            return exc
        assert pictures.shape[0] == 8 or reading.facts.frames < 8
        return reading

    assert isinstance(await read(SEEDS[name]), Reading)
    outcomes = []
    for _ in range(CASES_PER_FILE // 2):
        outcomes += await asyncio.gather(*(read(damaged(SEEDS[name], chance)) for _ in range(2)))
    for reading in outcomes:
        if isinstance(reading, Reading):
            facts, header = reading.facts, reading.header
            assert isinstance(facts, Facts)
            assert 0 < facts.duration_seconds <= LIMITS.max_seconds
            assert 0 < facts.frames <= LIMITS.max_frames
            assert facts.width * facts.height <= LIMITS.max_pixels
            assert all(0 <= index < header.total_num_frames for index in header.frames_indices)
            assert header.pixels_bytes <= MAX_BYTES
        else:
            assert "broke its reader" not in str(reading)
    assert isinstance(await read(SEEDS[name]), Reading)


@pytest.mark.parametrize("name", KINDS)
async def test_a_damaged_image_or_sound_is_examined_or_refused(reader, name):
    chance, kind = random.Random(f"examine {name}"), KINDS[name]
    demuxer = identify(SEEDS[name][:1024], kind).demuxer
    for _ in range(CASES_PER_FILE // 2):
        try:
            facts = await examine(reader, damaged(SEEDS[name], chance) or b"\0", demuxer=demuxer or "-", kind=kind)
        except ReadError as exc:
            assert "broke its reader" not in str(exc)  # noqa: PT017 - either is fine
        else:
            assert facts.decoded_bytes >= 0
            assert facts.duration_seconds <= LIMITS.max_seconds


async def test_all_frames_of_a_video_with_a_broken_one_are_given(reader):
    data = recording("matroska", "mpeg4", 24, 8, encoder=(("g", "1"),))
    at = data.index(b"\0\0\1\xb6", places(data)[5][0])
    reading, _ = await frames_of(reader, data[:at] + b"\xff" * 12 + data[at + 12 :], ALL_FRAMES)
    assert reading.header.frames_indices == [0, 1, 2, 3, 4, 4, *range(6, 24)]
