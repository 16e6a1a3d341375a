"""Kinds of videos that public collections of media showed, each made anew."""

import struct

import pytest
import pytest_asyncio

from server.media.identify import identify
from server.media.readers import Reader
from server.reader.facts import ReadError
from tests.server.reader.fields import in_fields, transport_stream
from tests.server.reader.lies import patched
from tests.server.reader.reading import ALL_FRAMES, EIGHT_FRAMES, LIMITS, examine, frames_of
from tests.server.reader.recordings import (
    HEIGHT,
    WIDTH,
    encrypted,
    encrypted_matroska,
    number_of,
    packets_of,
    recording,
    remuxed,
    scrambled,
    shown_by,
    with_note,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

GOP_12 = (("g", "12"), ("bf", "0"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def reader():
    reader = Reader(limits=LIMITS, seconds=30, num_workers=1)
    yield reader
    reader.close()


def numbers(pictures):
    return [number_of(picture) for picture in pictures]


@pytest.mark.parametrize("sampling", [ALL_FRAMES, EIGHT_FRAMES])
@pytest.mark.parametrize("make", [lambda: transport_stream(24), lambda: b"".join(in_fields(24))])
async def test_two_fields_in_packets_of_their_own_are_one_frame(reader, make, sampling):
    reading, pictures = await frames_of(reader, make(), sampling)
    assert (reading.facts.frames, reading.facts.width, reading.facts.height) == (24, 128, 64)
    assert (reading.facts.duration_seconds, reading.facts.fps) == (pytest.approx(0.96), pytest.approx(25))
    assert numbers(pictures) == reading.header.frames_indices
    rows = pictures[:, :, 8:120].astype(int)
    assert abs(rows[:, 0::2] - rows[:, 1::2]).max() <= 2  # both fields are there


@pytest.mark.parametrize("turn", [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)])
async def test_what_is_not_known_about_frames_is_passed_over(reader, turn):
    data = shown_by(remuxed("mp4", with_note(recording("h264", "libx264", encoder=GOP_12))), *turn)
    reading, pictures = await frames_of(reader, data, ALL_FRAMES)
    assert (reading.facts.width, reading.facts.height) == ((WIDTH, HEIGHT) if turn[0] else (HEIGHT, WIDTH))
    along = turn[0] or turn[1]  # what was on the left is now there or above, or opposite to that
    upright = pictures if turn[0] else pictures.transpose(0, 2, 1, 3)
    assert numbers(upright[:, :, ::along]) == list(range(24))


async def test_what_is_not_known_about_frames_is_passed_over_without_a_container(reader):
    reading, pictures = await frames_of(reader, with_note(recording("h264", "libx264", encoder=GOP_12)), ALL_FRAMES)
    assert reading.facts.frames == 24
    assert numbers(pictures) == list(range(24))


@pytest.mark.parametrize("share", [0.5, 1])
async def test_an_encrypted_mp4_is_said_to_be_one_even_if_it_is_broken(reader, share):
    data = encrypted(recording("mp4", "libx264", encoder=GOP_12, options=(("moov_size", "8192"),)))
    with pytest.raises(ReadError, match=r"^the video is encrypted$"):
        await examine(reader, data[: int(len(data) * share)])
    begin = data.index(b"stsz")
    with pytest.raises(ReadError, match=r"^the video is encrypted$"):
        await examine(reader, data[:begin])


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
async def test_an_encrypted_webm_is_said_to_be_one(reader, codec):
    data = recording("webm", codec, options=(("live", "1"),))
    assert (await examine(reader, data)).frames == 24
    with pytest.raises(ReadError, match=r"^the video is encrypted$"):
        await examine(reader, encrypted_matroska(data))


@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg2video"])
@pytest.mark.parametrize("spare", [0, 16])
async def test_a_scrambled_transport_stream_is_said_to_be_encrypted(reader, codec, spare):
    data = scrambled(recording("mpegts", codec, 48, 24, size=(320, 192)))
    data = b"".join(packet + bytes(spare) for packet in packets_of(data))
    with pytest.raises(ReadError, match=r"^the video is encrypted$"):
        await frames_of(reader, data)


@pytest.mark.parametrize("cut", [0, 100])
async def test_a_transport_stream_may_have_packets_of_204_bytes(reader, cut):
    data = b"".join(packet + bytes(16) for packet in packets_of(recording("mpegts", "libx264", encoder=GOP_12)))[cut:]
    assert identify(data[:1024], "video").mime == "video/mp2t"
    reading, pictures = await frames_of(reader, data, ALL_FRAMES)
    assert reading.facts.frames == 24
    assert numbers(pictures) == list(range(24))


async def test_frames_that_are_all_shown_at_once_are_frames(reader):
    data = recording("mp4", "libx264", encoder=GOP_12)
    (entries,) = struct.unpack_from(">I", data, data.index(b"stts") + 8)
    assert entries == 1
    data = patched(data, b"stts", 12, ">I", 0)
    reading, pictures = await frames_of(reader, data, ALL_FRAMES)
    assert reading.facts.frames == 24
    assert numbers(pictures) == list(range(24)) == reading.header.frames_indices


async def test_a_comment_behind_the_last_picture_is_no_picture(reader):
    data = recording("gif", "gif", 8, pix_fmt="gray")
    comment = b"\x21\xfe\x06behind\x00"
    assert data.endswith(b"\x3b")
    for changed in (data[:-1] + comment + b"\x3b", data[:-1] + comment, data[:-1] + comment * 2 + b"\x3b"):
        reading, pictures = await frames_of(reader, changed, ALL_FRAMES)
        assert reading.facts.frames == 8
        assert numbers(pictures) == list(range(8))


@pytest.mark.parametrize("b_frames", ["0", "2"])
async def test_a_first_key_frame_that_is_not_marked_is_one_all_the_same(reader, b_frames):
    data = recording("mp4", "libx264", 36, encoder=(("g", "12"), ("bf", b_frames), ("sc_threshold", "0")))
    at = data.index(b"stss") + 8
    assert struct.unpack_from(">IIII", data, at) == (3, 1, 13, 25)
    data = patched(data, b"stss", 8, ">II", 13, 13)
    for sampling in (ALL_FRAMES, EIGHT_FRAMES):
        reading, pictures = await frames_of(reader, data, sampling)
        assert reading.facts.frames == 36
        assert numbers(pictures) == reading.header.frames_indices
