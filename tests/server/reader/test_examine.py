import asyncio
import os
import signal
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from server.media.file import in_memory
from server.media.identify import HEAD_BYTES, identify
from server.media.readers import Reader
from server.reader.facts import Limits, ReadError
from server.reader.worker import MEMORY_BYTES
from tests.server.clips import clip, growing, picture, sound
from tests.server.harness import children
from tests.server.reader import lies

LIMITS = Limits(max_seconds=600, max_pixels=3840 * 2160, max_frames=100_000, sampled_frames=32)


@pytest.fixture
async def reader():
    reader = Reader(limits=LIMITS, seconds=20)
    yield reader
    reader.close()


async def examine(reader, data, demuxer=None, kind="video"):
    with in_memory(max_bytes=10**8) as file:
        file.write(data)
        found = demuxer or identify(data[:HEAD_BYTES], kind).demuxer
        return await reader.examine(file.descriptor(), kind=kind, demuxer=found)


@pytest.mark.parametrize(
    ("data", "container", "codec"),
    [
        (clip(), "mp4", "mpeg4"),
        (clip("mov"), "mov", "mpeg4"),
        (clip("webm", "vp8"), "webm", "vp8"),
        (clip("matroska"), "matroska", "mpeg4"),
        (clip("avi"), "avi", "mpeg4"),
        (clip("mp4", "libx264"), "mp4", "h264"),
        (clip("webm", "libsvtav1"), "webm", "av1"),
        (clip("avi", "mjpeg", pix_fmt="yuvj420p"), "avi", "mjpeg"),
    ],
)
async def test_a_reader_finds_a_videos_facts(reader, data, container, codec):
    facts = await examine(reader, data)
    assert (facts.container, facts.width, facts.height, facts.frames) == (container, 64, 48, 12)
    assert facts.codec == codec
    assert facts.decoded_bytes == 12 * 64 * 48 * 3
    assert facts.duration_seconds == pytest.approx(2.0, abs=0.2)
    assert facts.fps == pytest.approx(6.0, abs=0.6)


@pytest.mark.parametrize(
    "data",
    [
        clip()[: len(clip()) // 2],
        clip("webm", "vp8")[:300],
        b"\0\0\0\x20ftypisom" + b"\0" * 5000,
        b"\x1a\x45\xdf\xa3" + os.urandom(5000),
        b"RIFF\0\0\0\0AVI " + b"LIST" * 500,
    ],
)
async def test_truncated_and_broken_videos_are_refused_and_the_worker_lives(reader, data):
    await examine(reader, clip())
    before = reader.process_ids
    with pytest.raises(ReadError):
        await examine(reader, data)
    assert reader.process_ids == before
    assert (await examine(reader, clip())).frames == 12


async def test_a_playlist_is_not_opened_even_if_it_got_this_far(reader):
    with pytest.raises(ReadError):
        await examine(reader, b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "mp4")


async def test_a_reader_that_is_killed_costs_only_its_own_request(reader):
    await examine(reader, clip())
    (worker,) = reader.process_ids
    os.kill(worker, signal.SIGSTOP)
    asking = asyncio.create_task(examine(reader, clip()))
    await asyncio.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(ReadError, match="broke its reader"):
        await asking
    assert (await examine(reader, clip())).frames == 12


async def test_a_worker_that_died_idle_costs_no_request(reader):
    await examine(reader, clip())
    os.kill(reader.process_ids[0], signal.SIGKILL)
    await asyncio.sleep(0.1)
    assert (await examine(reader, clip())).frames == 12


async def test_a_reader_that_hangs_is_ended():
    reader = Reader(limits=LIMITS, seconds=0.2)
    try:
        await examine(reader, clip())
        (stuck,) = reader.process_ids
        os.kill(stuck, signal.SIGSTOP)
        with pytest.raises(ReadError, match=r"within 0\.2 seconds"):
            await examine(reader, clip())
        with pytest.raises(ProcessLookupError):
            os.kill(stuck, 0)
        assert (await examine(reader, clip())).frames == 12
    finally:
        reader.close()


async def test_a_worker_is_held_to_its_memory_and_time_and_writes_nothing(reader):
    await examine(reader, clip())
    (worker,) = reader.process_ids
    lines = Path(f"/proc/{worker}/limits").read_text().splitlines()
    soft = {line[:26].strip(): line[26:].split()[0] for line in lines[1:]}
    assert soft["Max address space"] == str(MEMORY_BYTES)
    assert soft["Max file size"] == soft["Max core file size"] == "0"
    assert 0 < int(soft["Max cpu time"]) < 60
    assert b"AOT_" not in Path(f"/proc/{worker}/environ").read_bytes()


async def test_readers_do_not_exceed_their_processes():
    reader = Reader(limits=LIMITS, seconds=20, num_workers=2)
    try:
        facts = await asyncio.gather(*(examine(reader, clip()) for _ in range(6)))
        assert {fact.frames for fact in facts} == {12}
        assert len(reader.process_ids) == 2
    finally:
        reader.close()


EIGHT_K = clip("mp4", "libx264", frames=1, size=(7680, 4320))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (lies.claims_frames(clip(), 10**6), "no frame that can be decoded"),
        (lies.claims_frames(clip(), 2**32 - 1), "no frame"),
        (lies.patched(clip("avi"), b"strh", 36, "<I", 50_000), "claims 50000 frames and holds 12"),
        (lies.patched(clip("avi"), b"strh", 36, "<I", 10**9), "more than 100000 frames"),
        (lies.claims_rate(clip(), 10**9), "claims 1e+09 frames per second, at most 1000"),
        (lies.patched(clip("avi"), b"strh", 24, "<II", 2**31 - 1, 1), "seconds, at most 600"),
        (lies.with_edits(clip(frames=60), [(10_000, 0)] * 20_000), "more than 100000 frames"),
        (lies.with_edits(clip(), [(2**32 - 1, -1), (1, 2**31 - 1)]), "no frame"),
        (EIGHT_K, "7680 x 4320 pixels, at most 8294400"),
        (lies.patched(EIGHT_K, b"tkhd", 76, ">II", 64 << 16, 48 << 16), "7680 x 4320 pixels, at most 8294400"),
        (lies.patched(EIGHT_K, b"avc1", 24, ">HH", 64, 48), "7680 x 4320 pixels, at most 8294400"),
        (clip("mov", "png", pix_fmt="rgb24"), "is in png; taken are h264, "),
        (clip("matroska", "ffv1"), "is in ffv1; taken are h264, "),
        (clip("mp4", "libx264")[:-300], "truncated"),
    ],
)
async def test_a_video_that_lies_or_takes_too_much_is_refused_and_the_worker_lives(reader, data, says):
    await examine(reader, clip())
    before = reader.process_ids
    with pytest.raises(ReadError) as caught:
        await examine(reader, data)
    assert says in str(caught.value)
    assert reader.process_ids == before


@pytest.mark.parametrize("ticks", [0, 1, 2**31, 2**32 - 1])
async def test_the_duration_is_that_of_the_frames_where_the_headers_say_another(reader, ticks):
    assert (await examine(reader, lies.claims_duration(clip(), ticks))).duration_seconds == pytest.approx(2.0, abs=0.2)


@pytest.mark.parametrize(
    ("change", "code"), [({"max_frames": 11}, "video_too_long"), ({"max_seconds": 1.9}, "video_too_long")]
)
async def test_a_video_beyond_a_limit_is_refused(change, code):
    reader = Reader(limits=replace(LIMITS, **change), seconds=20, num_workers=1)
    try:
        with pytest.raises(ReadError) as caught:
            await examine(reader, clip())
        assert caught.value.code == code
    finally:
        reader.close()


@pytest.mark.parametrize(
    ("container", "codec", "pix_fmt"),
    [
        ("mp4", "libx264", "yuv420p"),
        ("mpegts", "libx264", "yuv420p"),
        ("matroska", "libx265", "yuv420p"),
        ("webm", "libsvtav1", "yuv420p"),
        ("webm", "libvpx", "yuv420p"),
        ("webm", "libvpx-vp9", "yuv420p"),
        ("avi", "mpeg4", "yuv420p"),
        ("avi", "mjpeg", "yuvj420p"),
        ("flv", "flv1", "yuv420p"),
        ("mpegts", "libx265", "yuv420p"),
        ("mov", "prores_ks", "yuv422p10le"),
        ("mpegts", "mpeg2video", "yuv420p"),
    ],
)
async def test_frames_that_grow_in_the_middle_count_as_the_largest(reader, container, codec, pix_fmt):
    small, large = (64, 48), (320, 240)
    data = growing(container, codec, small, large, small, pix_fmt=pix_fmt)
    facts = await examine(reader, data)
    assert (facts.width, facts.height, facts.frames) == (*large, 12)
    assert facts.decoded_bytes == 12 * large[0] * large[1] * 3
    narrow = Reader(limits=replace(LIMITS, max_pixels=2**16), seconds=20, num_workers=1)
    try:
        with pytest.raises(ReadError, match="pixels, at most 65536 are allowed") as caught:
            await examine(narrow, data)
        assert caught.value.code == "media_too_large"
        assert (await examine(narrow, growing(container, codec, small, pix_fmt=pix_fmt))).width == small[0]
    finally:
        narrow.close()


async def test_a_last_frame_that_is_larger_is_noticed(reader):
    assert (await examine(reader, growing("mpegts", "libx264", (64, 48), (320, 240), each=1))).width == 320


async def test_frames_that_are_broken_behind_the_first_are_left_to_the_engines_which_pass_over_them(reader):
    data = clip("avi", "mpeg4", frames=12)
    at = data.index(b"00dc", data.index(b"00dc", data.index(b"movi")) + 4) + 12
    facts = await examine(reader, data[:at] + os.urandom(200) + data[at + 200 :])
    assert (facts.width, facts.height) == (64, 48)


def png_header(width, height):
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return picture()[:8] + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + picture()[33:]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP"])
async def test_an_image_is_measured_by_its_header(reader, kind):
    facts = await examine(reader, picture(40, 30, kind), kind="image")
    assert (facts.container, facts.width, facts.height) == (kind.lower(), 40, 30)
    assert facts.decoded_bytes == 40 * 30 * 3


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (png_header(50_000, 50_000), "50000 x 50000 pixels, at most"),
        (png_header(2**31 - 1, 2**31 - 1), "pixels, at most"),
        (picture()[:20], "truncated or broken"),
        (picture(kind="JPEG")[:20], "truncated or broken"),
        (b"GIF89a", "truncated or broken"),
        (b"%!PS-Adobe-3.0 EPSF", "truncated or broken"),
    ],
)
async def test_an_image_that_would_be_huge_or_is_none_is_refused(reader, data, says):
    with pytest.raises(ReadError, match=says):
        await examine(reader, data, demuxer="-", kind="image")


def text_bomb():
    """A PNG whose comment unpacks to 64 MiB."""
    comment = b"zTXt" + b"Comment\0\0" + zlib.compress(b"a" * 2**26)
    chunk = struct.pack(">I", len(comment) - 4) + comment + struct.pack(">I", zlib.crc32(comment))
    return picture()[:33] + chunk + picture()[33:]


async def test_an_image_with_a_comment_that_unpacks_to_megabytes_is_refused_or_left_packed(reader):
    try:
        facts = await examine(reader, text_bomb(), kind="image")
    except ReadError as exc:
        assert "truncated or broken" in str(exc)  # noqa: PT017 - either is fine
    else:
        assert facts.width == 16
    assert len(reader.process_ids) == 1


async def test_a_sound_has_a_duration(reader):
    facts = await examine(reader, sound(1.5), kind="audio")
    assert (facts.codec, facts.duration_seconds) == ("pcm_s16le", 1.5)
    assert facts.decoded_bytes == 1.5 * 8000 * 4


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (lies.patched(sound(), b"fmt ", 8, "<I", 1), "lasts 4000 seconds, at most 600"),
        (lies.patched(sound(), b"fmt ", 8, "<I", 0), "truncated or broken"),
        (sound()[:30], "truncated or broken"),
    ],
)
async def test_a_sound_that_lasts_too_long_or_is_none_is_refused(reader, data, says):
    with pytest.raises(ReadError, match=says):
        await examine(reader, data, kind="audio")


async def test_a_worker_that_starts_as_its_request_leaves_is_ended(reader):
    before = children(os.getpid())
    asking = asyncio.create_task(examine(reader, clip()))
    await asyncio.sleep(0.001)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert children(os.getpid()) == before
