"""The loader of frames files: what it reads is what was written, and whatever else it is given is a `ValueError`."""

import hashlib
import json
import math
import re
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aot_vllm import frames as loader
from aot_vllm.frames import HEADER_START, MAGIC, is_frames_file, map_frames, read_frames
from tests.frames.files import frames_file, head, header


def pictures(frames=3, height=5, width=7, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def written(tmp_path, content, name="video.frames"):
    path = tmp_path / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (32, 84, 84), (2, 1, 4097)])
def test_what_is_read_is_what_was_written(tmp_path, shape, compression):
    frames = pictures(*shape)
    content = frames_file(frames, fps=29.97, total=300, compression=compression)
    assert len(head(header(frames))) % 4096 == 0
    for video in (read_frames(content), map_frames(written(tmp_path, content))):
        np.testing.assert_array_equal(video.frames, frames)
        assert (video.frames.dtype, video.frames.flags.c_contiguous) == (np.uint8, True)
        assert video.metadata == {
            "total_num_frames": 300,
            "fps": 29.97,
            "duration": 300 / 29.97,
            "video_backend": "aot_frames",
            "frames_indices": list(range(len(frames))),
            "do_sample_frames": False,
        }


def test_a_frame_may_be_given_twice():
    frame = pictures(1)
    video = read_frames(frames_file(np.concatenate([frame, frame]), indices=[0, 0]))
    assert video.metadata["frames_indices"] == [0, 0]
    assert video.metadata["total_num_frames"] == 1


def test_a_mapped_file_may_be_deleted_or_replaced_while_its_frames_are_in_use(tmp_path):
    frames = pictures(8, 64, 64)
    path = written(tmp_path, frames_file(frames))
    video = map_frames(path)
    written(tmp_path, frames_file(255 - frames), "other").replace(path)
    np.testing.assert_array_equal(video.frames, frames)
    path.unlink()
    np.testing.assert_array_equal(video.frames, frames)


def test_mapping_a_file_takes_no_memory_for_its_frames(tmp_path):
    path = written(tmp_path, frames_file(pictures(16, 256, 256)))
    tracemalloc.start()
    video = map_frames(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert video.frames.nbytes == 16 * 256 * 256 * 3
    assert peak < 2**17


def test_writing_to_frames_changes_neither_the_file_nor_what_the_caller_holds(tmp_path):
    content = frames_file(pictures())
    path = written(tmp_path, content)
    for video in (map_frames(path), read_frames(content)):
        video.frames[:] = 0
        assert not video.frames.any()
    assert path.read_bytes() == content == frames_file(pictures())


def test_the_identity_is_short_and_changes_with_every_byte_of_content_and_metadata(tmp_path):
    frames = pictures()
    other = frames.copy()
    other[-1, -1, -1, -1] ^= 1
    contents = [
        frames_file(frames),
        frames_file(other),
        frames_file(frames, fps=9.0),
        frames_file(frames, total=30),
        frames_file(frames, indices=[0, 2, 4]),
        frames_file(frames.reshape(3, 7, 5, 3)),
        frames_file(frames, compression="zlib"),
    ]
    identities = [read_frames(content).identity for content in contents]
    assert len(set(identities)) == len(contents)
    assert identities == [MAGIC + hashlib.sha256(content).digest() for content in contents]
    assert identities == [map_frames(written(tmp_path, content)).identity for content in contents]


def test_eight_bytes_decide():
    assert is_frames_file(MAGIC)
    assert is_frames_file(memoryview(frames_file(pictures())))
    assert not any(map(is_frames_file, (b"", MAGIC[:7], b"\0" + MAGIC, b"\0\0\0\x18ftypmp42")))


WRONG = {
    "version": [0, 2, "1", True, None],
    "compression": ["gzip", "", 0, False, []],
    "frames": [0, -1, 2.0, True, "3", None, 2**14 + 1, 2, 4],
    "height": [0, -5, 5.0, None, 2**14 + 1, 4, 6],
    "width": [0, 2**40, True, [], 8],
    "total_num_frames": [0, -1, 3.0, None, True],
    "fps": [0, -1.0, math.nan, math.inf, True, "8", None, 10**400],
    "duration": [0, math.nan, -math.inf, None, []],
    "frames_indices": [
        None,
        {},
        "012",
        [0, 1],
        [0, 1, 2, 3],
        [0, 1, 3],
        [-1, 0, 1],
        [0, 1, 2.0],
        [0, 1, None],
        [[0]] * 3,
    ],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_value_is_named_with_what_is_allowed(tmp_path, name, value):
    frames = pictures()
    fields = {**header(frames), name: value}
    content = head(fields) + frames.tobytes()
    for read in (read_frames, lambda content: map_frames(written(tmp_path, content))):
        with pytest.raises(ValueError, match=r"must (be|take)") as error:
            read(content)
        told = str(error.value)
        assert name in told or "must take" in told  # sizes that lie about what follows
    del fields[name]
    with pytest.raises(ValueError, match=f"^{name} of a frames file must be "):
        read_frames(head(fields) + frames.tobytes())


def test_a_refusal_says_value_and_range():
    def refusal(content):
        with pytest.raises(ValueError, match="frames") as error:
            read_frames(content)
        return str(error.value)

    frames = pictures()
    fields = header(frames)
    assert refusal(head({**fields, "frames": 0})) == "frames of a frames file must be an integer in [1, 16384], got 0"
    assert refusal(head({**fields, "version": 2})) == "version of a frames file must be 1, got 2"
    assert refusal(head({**fields, "compression": "lz4"})) == (
        "compression of a frames file must be null or \"zlib\", got 'lz4'"
    )
    assert refusal(head({**fields, "fps": 0})) == "fps of a frames file must be a finite number above 0, got 0"
    assert refusal(head(fields) + b"xy") == "frames of 3 x 5 x 7 x 3 must take 315 bytes, got 2"
    assert refusal(frames_file(frames)[:-1]) == "frames of 3 x 5 x 7 x 3 must take 315 bytes, got 314"
    assert refusal(frames_file(frames) + b"\n") == "frames of 3 x 5 x 7 x 3 must take 315 bytes, got 316"
    assert refusal(MAGIC + b"\xff" * 8 + b"{}") == (
        "the header of this frames file may have up to 2 bytes, got 18446744073709551615"
    )
    assert refusal(b"\0\0\0\x18ftypmp42") == (
        "a frames file must begin with b'AOTFRM1\\n', got b'\\x00\\x00\\x00\\x18ftyp'"
    )


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"3", b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 5000, b'{"version": 1} x']
)
def test_a_header_that_is_no_json_object_is_refused(text):
    with pytest.raises(ValueError, match=r"^the header of a frames file must be "):
        read_frames(MAGIC + len(text).to_bytes(8, "little") + text)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 12, 15])
def test_a_file_that_ends_within_its_beginning_is_refused(tmp_path, length):
    path = written(tmp_path, frames_file(pictures())[:length])
    for read in (lambda: map_frames(path), lambda: read_frames(path.read_bytes())):
        with pytest.raises(ValueError, match="frames file"):
            read()


def test_a_header_of_more_than_a_mebibyte_is_refused():
    text = json.dumps(header(pictures())).encode() + b" " * 2**20
    with pytest.raises(ValueError, match=r"may have up to 1048576 bytes, got \d{7}$"):
        read_frames(MAGIC + len(text).to_bytes(8, "little") + text)


COMPRESSED = {
    "more": (lambda pixels: zlib.compress(pixels + b"\0"), "must inflate to 315 bytes, got more"),
    "fewer": (lambda pixels: zlib.compress(pixels[:-1]), "must inflate to 315 bytes, got 314"),
    "cut": (lambda pixels: zlib.compress(pixels)[:-9], "must inflate to 315 bytes, got a stream that ends after"),
    "without its checksum": (lambda pixels: zlib.compress(pixels)[:-4], "got a stream that ends after 315"),
    "two streams": (lambda pixels: zlib.compress(pixels) * 2, "nothing may follow the frames, got"),
    "a tail": (lambda pixels: zlib.compress(pixels) + b"\0", "nothing may follow the frames, got 1 bytes"),
    "a long tail": (lambda pixels: zlib.compress(pixels) + b"\0" * 10**6, "nothing may follow the frames, got 1000000"),
    "not compressed": (lambda pixels: pixels, "must be one zlib stream: "),
    "a gzip stream": (lambda pixels: zlib.compress(pixels, wbits=31), "must be one zlib stream: "),
    "nothing": (lambda pixels: b"", "must inflate to 315 bytes, got 0 compressed ones"),
}


@pytest.mark.parametrize("case", COMPRESSED)
def test_a_zlib_stream_holds_the_frames_and_nothing_else(case):
    make, told = COMPRESSED[case]
    frames = pictures()
    content = head(header(frames, compression="zlib")) + make(frames.tobytes())
    with pytest.raises(ValueError, match=re.escape(told)):
        read_frames(content)


def bomb(claimed, held):
    """Return a compressed file that says it has `claimed` frames of 512x512, with `held` frames of zeros in it."""
    fields = header(np.empty((claimed, 512, 512, 3), np.uint8), compression="zlib")
    return head(fields) + zlib.compress(bytes(held * 512 * 512 * 3), 9)


@pytest.mark.parametrize(("claimed", "held"), [(1, 256), (256, 1)])
def test_a_stream_takes_no_more_memory_than_its_header_says_nor_than_it_has_itself(claimed, held):
    content = bomb(claimed, held)
    tracemalloc.start()
    with pytest.raises(ValueError, match="must inflate to"):
        read_frames(content)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * 2**20


def test_compressed_frames_have_a_limit_however_honest_their_header():
    fields = header(np.empty((1, 1, 1, 3), np.uint8), compression="zlib")
    fields |= {"frames": 1024, "height": 1024, "width": 1024, "frames_indices": [0] * 1024}
    with pytest.raises(
        ValueError, match=r"^compressed frames may take up to 2147483648 bytes, got 1024 x 1024 x 1024 x 3$"
    ):
        read_frames(head(fields))


def read_or_refuse(content, path):
    """Read a file both ways; return the video, None if it was refused. Any other exception is a failure."""
    videos = []
    path.write_bytes(content)
    for read in (lambda: read_frames(content), lambda: map_frames(path)):
        try:
            videos.append(read())
        except ValueError:
            videos.append(None)
    one, other = videos
    assert (one is None) == (other is None)
    if one is not None:
        np.testing.assert_array_equal(one.frames, other.frames)
        assert one.metadata == other.metadata
        assert len(one.frames) == len(one.metadata["frames_indices"]) >= 1
        assert one.frames.shape[3] == 3
    return one


VALID = {compression: frames_file(pictures(), total=9, compression=compression) for compression in (None, "zlib")}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("frames") / "video.frames"


@given(compression=st.sampled_from([None, "zlib"]), data=st.data())
@settings(deadline=None, max_examples=100)
def test_any_truncation_is_refused(path, compression, data):
    content = VALID[compression]
    length = data.draw(st.integers(0, len(content) - 1))
    assert read_or_refuse(content[:length], path) is None


@given(compression=st.sampled_from([None, "zlib"]), flips=st.lists(st.integers(0, 8 * 400 - 1), min_size=1, max_size=3))
@settings(deadline=None, max_examples=100)
def test_any_flipped_bits_of_the_head_are_refused_or_read(path, compression, flips):
    content = bytearray(VALID[compression])
    for bit in flips:
        content[bit // 8] ^= 1 << bit % 8
    read_or_refuse(bytes(content), path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@given(fields=st.dictionaries(st.sampled_from(sorted(header(pictures()))), VALUES, min_size=1, max_size=4))
@settings(deadline=None, max_examples=100)
def test_any_values_in_the_header_are_refused_or_read(path, fields):
    frames = pictures()
    read_or_refuse(head({**header(frames), **fields}) + frames.tobytes(), path)


@given(stream=st.binary(max_size=200))
@settings(deadline=None, max_examples=100)
def test_any_bytes_in_place_of_a_zlib_stream_are_refused(path, stream):
    content = head(header(pictures(), compression="zlib")) + b"\x78\x01" + stream
    assert read_or_refuse(content, path) is None


def test_the_limits_hold_a_video_that_vllm_samples():
    assert loader.MAX_FRAMES >= 768
    assert HEADER_START == 16
