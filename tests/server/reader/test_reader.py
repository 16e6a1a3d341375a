"""The reader and its workers: what is bounded, what a worker may do, what happens when it dies."""

import asyncio
import errno
import os
import signal
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from server.media import readers
from server.media.file import in_memory
from server.media.readers import Reader
from server.reader import worker as reader_worker
from server.reader.facts import ReadError
from server.reader.frames_file import FramesFile, FramesHeader, compressed, read_header
from server.reader.wanted import Wanted
from server.reader.worker import MAX_HEADER_BYTES, MEMORY_BYTES
from tests.server.clips import clip
from tests.server.reader import lies
from tests.server.reader.reading import EIGHT_FRAMES, LIMITS, examine, frames_of, pixels_in
from tests.server.reader.recordings import HEIGHT, WIDTH, number_of, recording

MAX_FRAMES_BYTES = 2**28


@pytest.fixture
async def reader():
    reader = Reader(limits=LIMITS, seconds=20, num_workers=1, max_frames_bytes=MAX_FRAMES_BYTES)
    yield reader
    reader.close()


def plain():
    return recording("mp4", "libx264")


async def test_a_frames_file_has_what_the_contract_says(reader):
    into = os.memfd_create("frames")
    with in_memory(max_bytes=10**8) as file:
        file.write(plain())
        wanted = Wanted(sampling=EIGHT_FRAMES, max_bytes=2**20)
        reading = await reader.read(file.descriptor(), demuxer="mp4", wanted=wanted, into=into)
    raw = os.pread(into, 2**24, 0)
    assert raw[:8] == b"AOTFRM1\n"
    length = int.from_bytes(raw[8:16], "little")
    assert (16 + length) % 4096 == 0
    assert len(raw) == 16 + length + 8 * HEIGHT * WIDTH * 3
    header, begin = read_header(into)
    assert begin == 16 + length
    assert header == reading.header
    assert header == FramesHeader(
        frames=8,
        height=HEIGHT,
        width=WIDTH,
        total_num_frames=24,
        fps=8.0,
        duration=3.0,
        frames_indices=[0, 3, 6, 9, 13, 16, 19, 23],
        source_height=HEIGHT,
        source_width=WIDTH,
    )
    os.close(into)


async def test_a_frames_file_can_be_compressed(reader, tmp_path):
    into = os.memfd_create("frames")
    with in_memory(max_bytes=10**8) as file:
        file.write(plain())
        wanted = Wanted(sampling=EIGHT_FRAMES, max_bytes=2**20)
        await reader.read(file.descriptor(), demuxer="mp4", wanted=wanted, into=into)
    small = tmp_path / "small.frames"
    small.write_bytes(b"".join(compressed(into)))
    with small.open("rb") as file:
        header, begin = read_header(file.fileno())
        assert header == replace(read_header(into)[0], compression="zlib")
        assert zlib.decompress(small.read_bytes()[begin:]) == pixels_in(into).tobytes()
    os.close(into)


async def test_frames_that_hardly_shrink_are_not_compressed(reader):
    into = os.memfd_create("frames")
    with in_memory(max_bytes=10**8) as file:
        file.write(recording("mp4", "libx264", draw=noise))
        wanted = Wanted(sampling=EIGHT_FRAMES, max_bytes=2**20)
        await reader.read(file.descriptor(), demuxer="mp4", wanted=wanted, into=into)
    sent = os.memfd_create("sent")
    os.write(sent, b"".join(compressed(into)))
    assert read_header(sent)[0] == read_header(into)[0]
    assert np.array_equal(pixels_in(sent), pixels_in(into))
    os.close(into)
    os.close(sent)


def noise(number, width, height):
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)


def test_a_frame_of_another_size_is_not_written(tmp_path):
    header = FramesHeader(1, 2, 2, 1, 1.0, 1.0, [0], 2, 2)
    with (tmp_path / "frames").open("w+b") as file:
        with pytest.raises(ValueError, match="a frame must have 12 bytes, got 5"):
            FramesFile(file.fileno(), header).write(0, b"short")
        with pytest.raises(ValueError, match="not a frames file"):
            read_header(file.fileno())


async def test_a_frame_that_is_asked_for_twice_is_given_twice(reader):
    rule = {"rule": "qwen2_vl", "fps": 2}
    reading, pictures = await frames_of(reader, recording("mp4", "libx264", 1), rule)
    assert reading.header.frames_indices == [0, 0]
    assert [number_of(picture) for picture in pictures] == [0, 0]


async def test_thousands_of_frames_can_be_asked_for(reader):
    data = recording("matroska", "mpeg4", 12_000, 100, size=(16, 16))
    reading, pictures = await frames_of(reader, data, {"rule": "uniform", "num_frames": -1})
    assert reading.header.frames_indices == list(range(12_000))
    assert len(pictures) == 12_000


async def test_frames_that_take_too_much_are_refused_before_any_is_decoded(reader):
    with pytest.raises(ReadError, match="8 frames of 128 x 64 pixels take 196608 bytes, at most 196607") as caught:
        await frames_of(reader, plain(), max_bytes=196_607)
    assert caught.value.code == "media_too_large"
    reading, _ = await frames_of(reader, plain(), max_bytes=196_608)
    assert reading.header.pixels_bytes == 196_608
    with pytest.raises(ValueError, match=f"max_bytes must be at most {MAX_FRAMES_BYTES}"):
        await frames_of(reader, plain(), max_bytes=MAX_FRAMES_BYTES + 1)


@pytest.mark.parametrize(("start", "end"), [(3, None), (100, 200), (2, 1)])
async def test_a_range_without_a_frame_is_refused(reader, start, end):
    with pytest.raises(ReadError, match=f"no frame from {start} to .* seconds: it lasts 3"):
        await frames_of(reader, plain(), start=start, end=end)


async def test_a_worker_may_write_what_it_is_asked_for_and_nothing_else(reader):
    await frames_of(reader, plain())
    (worker,) = reader.process_ids
    lines = Path(f"/proc/{worker}/limits").read_text().splitlines()
    limits = {line[:26].strip(): line[26:].split()[:2] for line in lines[1:]}
    assert limits["Max file size"] == ["0", str(MAX_FRAMES_BYTES + MAX_HEADER_BYTES)]
    assert limits["Max address space"][0] == str(MEMORY_BYTES)
    assert limits["Max core file size"][0] == "0"
    environment = Path(f"/proc/{worker}/environ").read_bytes().split(b"\0")
    assert {entry.split(b"=")[0] for entry in environment if entry} == {b"PYTHONPATH", b"OPENBLAS_NUM_THREADS"}


async def test_a_worker_keeps_no_file_open(reader):
    for _ in range(3):
        await frames_of(reader, plain())
        with pytest.raises(ReadError):
            await frames_of(reader, plain()[:1000])
    (worker,) = reader.process_ids
    assert len(os.listdir(f"/proc/{worker}/fd")) <= 4


async def test_a_worker_that_dies_while_it_reads_costs_only_its_own_request(reader):
    await frames_of(reader, plain())
    (worker,) = reader.process_ids
    os.kill(worker, signal.SIGSTOP)
    asking = asyncio.create_task(frames_of(reader, plain()))
    await asyncio.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(ReadError, match="broke its reader"):
        await asking
    reading, _ = await frames_of(reader, plain())
    assert reading.facts.frames == 24


async def test_reading_that_takes_too_long_is_ended():
    reader = Reader(limits=LIMITS, seconds=1, num_workers=1)
    try:
        await examine(reader, clip())
        (stuck,) = reader.process_ids
        os.kill(stuck, signal.SIGSTOP)
        with pytest.raises(ReadError, match=r"the video could not be read within 1 seconds"):
            await frames_of(reader, plain())
        with pytest.raises(ProcessLookupError):
            os.kill(stuck, 0)
    finally:
        reader.close()


async def test_reading_that_takes_too_much_of_a_processor_is_said_to_take_too_long(reader):
    await examine(reader, clip())
    (busy,) = reader.process_ids
    os.kill(busy, signal.SIGSTOP)
    asking = asyncio.create_task(examine(reader, clip()))
    await asyncio.sleep(0.1)
    os.kill(busy, signal.SIGXCPU)  # what the kernel does when its time is spent
    os.kill(busy, signal.SIGCONT)
    with pytest.raises(ReadError, match="the video could not be read within 20 seconds"):
        await asking


@pytest.mark.parametrize(
    ("num_workers", "num_files", "threads"), [(1, 1, [1]), (3, 1, [3]), (3, 3, [3, 1, 1]), (9, 1, [4])]
)
async def test_files_share_the_readers_threads(monkeypatch, num_workers, num_files, threads):
    asked = []

    async def ask(worker, job, descriptors):
        asked.append(job["threads"])
        await asyncio.sleep(0.05)
        return await really(worker, job, descriptors)

    really = readers._Worker.ask
    monkeypatch.setattr(readers._Worker, "ask", ask)
    reader = Reader(limits=LIMITS, seconds=20, num_workers=num_workers)
    try:
        await asyncio.gather(*(examine(reader, plain()) for _ in range(num_files)))
        await examine(reader, plain())
    finally:
        reader.close()
    assert sorted(asked[:-1], reverse=True) == threads
    assert asked[-1] == threads[0]


def test_a_full_disk_is_not_the_videos_fault(monkeypatch):
    def full(job, descriptors):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(reader_worker, "_result", full)
    answer = reader_worker._answer({"kind": "video"}, [])
    assert answer == {"error": "there is no room for the video's frames", "code": "no_room"}


async def test_a_worker_that_does_not_start_is_an_error(reader, monkeypatch):
    monkeypatch.setattr("server.media.readers.sys.executable", "/bin/false")
    with pytest.raises(ReadError, match="the video could not be read: its reader did not start"):
        await examine(reader, plain())


async def test_an_edit_list_cuts_frames_away(reader):
    data = recording("mp4", "libx264", 48, 8, encoder=(("g", "48"), ("bf", "0")))
    cut = lies.with_edits(data, [(2000, 2 * 16384)])  # two seconds, from the second on
    reading, pictures = await frames_of(reader, cut)
    assert reading.facts.frames == 16
    assert reading.facts.duration_seconds == pytest.approx(2)
    assert [number_of(picture) for picture in pictures] == [16 + index for index in reading.header.frames_indices]
    assert reading.header.frames_indices == [0, 2, 4, 6, 8, 10, 12, 15]


async def test_a_rate_that_the_header_makes_up_is_not_believed(reader):
    data = recording("matroska", "libx264")
    at = data.index(b"\x23\xe3\x83\x84") + 4  # DefaultDuration, of four bytes
    facts = await examine(reader, data[:at] + (1000).to_bytes(4, "big") + data[at + 4 :])
    assert (facts.frames, facts.duration_seconds) == (24, pytest.approx(3, abs=0.13))
