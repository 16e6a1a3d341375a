"""The clips of benchmarks: as long as they say, of pictures that all differ, and never the same file twice."""

import io
import itertools

import av
import numpy as np
import pytest

from bench import clips
from bench.clips import Kind, clip, marking


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(clips, "CACHE", tmp_path)
    monkeypatch.setattr(clips, "PERIOD_SECONDS", 1)


def frames_in(data):
    with av.open(io.BytesIO(data)) as source:
        stream = source.streams.video[0]
        return [(frame.time, frame.key_frame, frame.to_ndarray(format="gray8")) for frame in source.decode(stream)]


@pytest.mark.parametrize("codec", clips.CODECS)
def test_a_long_clip_is_a_short_one_over_and_over(codec):
    short, long = (frames_in(clip(Kind(codec, "240p", seconds)).read_bytes()) for seconds in (1, 3))
    assert len(short) == clips.RATE
    assert len(long) == 3 * clips.RATE
    times = [time for time, _, _ in long]
    assert np.allclose(np.diff(times), 1 / clips.RATE, atol=0.0011)
    assert [number for number, (_, is_key, _) in enumerate(long) if is_key] == [0, clips.RATE, 2 * clips.RATE]
    for (_, _, one), (_, _, other) in zip(short * 3, long, strict=True):
        assert np.array_equal(one, other)
    for (_, _, one), (_, _, other) in itertools.pairwise(short):
        assert np.abs(one.astype(int) - other).mean() > 1


@pytest.mark.parametrize("codec", ["h264", "vp9"])
def test_a_mark_makes_another_file_of_the_same_video(codec):
    path = clip(Kind(codec, "240p", 1))
    marked = path.read_bytes() + marking(path, "number 7")
    assert marked != path.read_bytes() + marking(path, "number 8")
    for (_, _, one), (_, _, other) in zip(frames_in(path.read_bytes()), frames_in(marked), strict=True):
        assert np.array_equal(one, other)


def test_clips_have_names():
    assert [Kind("h264", "720p", seconds).name for seconds in (10, 60, 600)] == [
        "h264 720p 10 s",
        "h264 720p 1 min",
        "h264 720p 10 min",
    ]
