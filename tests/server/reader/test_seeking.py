"""Frames that are reached from a key frame are, to the bit, those that come out when all are decoded in turn."""

import io
import random

import av
import numpy as np
import pytest
import pytest_asyncio

from server.media.readers import Reader
from server.reader import frame_headers
from server.reader.facts import ReadError
from server.reader.pictures import Pictures
from tests.server.reader.reading import ALL_FRAMES, LIMITS, frames_of
from tests.server.reader.recordings import HEIGHT, WIDTH, busy, every_packet_a_key, recording

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def reader():
    reader = Reader(limits=LIMITS, seconds=30, num_workers=1)
    yield reader
    reader.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def threaded():
    """A reader that decodes with three threads what it reads alone."""
    reader = Reader(limits=LIMITS, seconds=30, num_workers=3)
    yield reader
    reader.close()


def video(container, codec, *, rate=24, pix_fmt="yuv420p", **encoder):
    options = tuple((name.replace("_", "-"), str(value)) for name, value in encoder.items())
    return recording(container, codec, 96, rate, encoder=options, pix_fmt=pix_fmt, draw=busy)


ALT_REF = {"g": 32, "auto_alt_ref": 1, "lag_in_frames": 16, "b": "300k"}
VIDEOS = {
    "h264, one group": lambda: video("mp4", "libx264", g=250, bf=3),
    "h264, groups": lambda: video("mp4", "libx264", g=24, bf=3),
    "h264, open groups": lambda: video("mp4", "libx264", g=24, bf=3, x264_params="open-gop=1:scenecut=0"),
    "h264, open groups, broadcast": lambda: video("mpegts", "libx264", x264_params="open-gop=1:keyint=24:scenecut=0"),
    "h264, refreshed bit by bit": lambda: video("matroska", "libx264", g=24, x264_params="intra-refresh=1"),
    "h264, broadcast": lambda: video("mpegts", "libx264", g=24, bf=3),
    "h264, no times": lambda: video("avi", "libx264", g=24, bf=3),
    "hevc, open groups": lambda: video("mp4", "libx265", g=24),
    "hevc, layers": lambda: video("mp4", "libx265", g=24, x265_params="temporal-layers=3:log-level=none"),
    "hevc, closed groups": lambda: video("matroska", "libx265", g=24, x265_params="open-gop=0:log-level=none"),
    "hevc, broadcast": lambda: video("mpegts", "libx265", g=24),
    "vp8, hidden frames": lambda: video("webm", "libvpx", **ALT_REF),
    "vp9, hidden frames": lambda: video("webm", "libvpx-vp9", **ALT_REF),
    "av1": lambda: video("mp4", "libsvtav1", g=24, preset=12),
    "av1, matroska": lambda: video("matroska", "libsvtav1", g=24, preset=12),
    "mpeg-2, broadcast": lambda: video("mpegts", "mpeg2video", g=12, bf=2),
    "mpeg-2, program": lambda: video("mpeg", "mpeg2video", g=12, bf=2),
    "mpeg-4": lambda: video("mp4", "mpeg4", g=24, bf=2),
    "mpeg-4, no times": lambda: video("avi", "mpeg4", g=24, bf=2),
    "wmv": lambda: video("asf", "wmv2", g=24),
    "flv": lambda: video("flv", "flv1", g=24),
    "mjpeg": lambda: video("avi", "mjpeg", pix_fmt="yuvj420p"),
    "mpeg-4, all marked as key frames": lambda: every_packet_a_key("matroska", video("mp4", "mpeg4", g=24)),
    "h264, all marked as key frames": lambda: every_packet_a_key("matroska", video("mp4", "libx264", g=24)),
}


def all_in_turn(data):
    """The pixels of all frames, with nothing skipped."""
    pictures = Pictures((HEIGHT, WIDTH))
    with av.open(io.BytesIO(data)) as source:
        stream = source.streams.video[0]
        return [np.frombuffer(pictures.pixels(frame), np.uint8) for frame in source.decode(stream)]


@pytest.mark.parametrize("name", VIDEOS)
async def test_frames_are_exact_wherever_they_are(reader, name):
    data = VIDEOS[name]()
    right = all_in_turn(data)
    assert len(right) == 96
    samplings = [({"rule": "uniform", "num_frames": count}, 0) for count in (1, 2, 7, 32)]
    for sampling, start in [*samplings, ({"rule": "uniform", "num_frames": 3}, 2.3), (ALL_FRAMES, 0)]:
        reading, pictures = await frames_of(reader, data, sampling, start=start)
        assert reading.facts.frames == 96
        for index, picture in zip(reading.header.frames_indices, pictures, strict=True):
            assert np.array_equal(picture.ravel(), right[index]), (sampling, start, index)


THREADED = [name for name in VIDEOS if name.startswith(("h264", "hevc", "vp9", "av1"))]


@pytest.mark.parametrize("name", THREADED)
async def test_several_threads_give_the_same_frames(threaded, name):
    data = VIDEOS[name]()
    right = all_in_turn(data)
    for count in (7, 32, 96):
        reading, pictures = await frames_of(threaded, data, {"rule": "uniform", "num_frames": count})
        assert len(pictures) == count
        for index, picture in zip(reading.header.frames_indices, pictures, strict=True):
            assert np.array_equal(picture.ravel(), right[index]), (count, index)


def damaged(data, seed):
    """The same with bytes changed in three places behind the headers."""
    rng, changed = random.Random(seed), bytearray(data)
    for _ in range(3):
        at = rng.randrange(len(data) // 3, len(data) - 8)
        changed[at : at + 8] = rng.randbytes(8)
    return bytes(changed)


async def what_is_read(reader, data):
    try:
        reading, pictures = await frames_of(reader, data, {"rule": "uniform", "num_frames": 32})
    except ReadError as exc:
        return str(exc)
    return reading.header, pictures.tobytes()


# What libav makes of damaged H.264 differs from run to run with one thread too: it fills in from memory it has at hand.
@pytest.mark.parametrize("name", [name for name in THREADED if not name.startswith("h264")])
async def test_damage_is_to_several_threads_what_it_is_to_one(reader, threaded, name):
    for seed in range(4):
        data = damaged(VIDEOS[name](), seed)
        assert await what_is_read(threaded, data) == await what_is_read(reader, data), seed


@pytest.mark.parametrize("name", [name for name in THREADED if name.startswith("h264")])
async def test_damaged_h264_is_read_by_several_threads_if_it_is_by_one(reader, threaded, name):
    data = damaged(VIDEOS[name](), 0)
    one, several = await what_is_read(reader, data), await what_is_read(threaded, data)
    assert type(one) is type(several)


@pytest.mark.parametrize("name", [name for name in VIDEOS if name.startswith("hevc")])
async def test_in_hevc_frames_that_no_other_refers_to_are_known(name):
    with av.open(io.BytesIO(VIDEOS[name]())) as source:
        stream = source.streams.video[0]
        layers = frame_headers.hevc_layers(stream)
        read = [(packet.is_keyframe, *layers(packet)) for packet in source.demux(stream) if packet.size]
    assert len(read) == 96
    assert {layer for _, layer, _ in read} == ({0, 1, 2} if name == "hevc, layers" else {0})
    assert all(is_referred for is_key, _, is_referred in read if is_key)
    assert 10 < sum(not is_referred for _, _, is_referred in read) < 80


async def test_a_range_has_the_frames_that_are_shown_in_it(reader):
    data = video("mp4", "libx264", g=24)
    whole = {"start": 1, "end": 2}
    reading, _ = await frames_of(reader, data, ALL_FRAMES, **whole)
    assert reading.header.frames_indices == list(range(24, 48))
    assert (reading.header.total_num_frames, reading.header.duration) == (96, 4)
    reading, _ = await frames_of(reader, data, {"rule": "qwen3_vl", "fps": 2, "min_frames": 2}, **whole)
    assert reading.header.frames_indices == [24, 47]
    reading, _ = await frames_of(reader, data, ALL_FRAMES, start=1.02, end=1.03)
    assert reading.header.frames_indices == [24]
    reading, _ = await frames_of(reader, data, ALL_FRAMES, start=3.99)
    assert reading.header.frames_indices == [95]


async def test_a_request_may_say_how_many_frames_it_wants(reader):
    data = video("mp4", "libx264", g=24)
    rule = {"rule": "qwen2_vl", "fps": 2, "min_frames": 4, "max_frames": 768, "frame_factor": 2}
    reading, _ = await frames_of(reader, data, rule, num_frames=6)
    assert reading.header.frames_indices == [0, 16, 32, 48, 64, 80]
    reading, _ = await frames_of(reader, data, rule, fps=1)
    assert reading.header.frames_indices == [0, 24, 48, 72]
    reading, _ = await frames_of(reader, data, {"rule": "uniform", "num_frames": 32}, num_frames=2)
    assert reading.header.frames_indices == [0, 95]
