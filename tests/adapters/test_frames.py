"""Frames files in vLLM's own media connector: read by our loader, while every other video goes to vLLM's."""

import base64
import io

import numpy as np
import pytest
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.media import MediaConnector
from vllm.multimodal.media import video as media
from vllm.multimodal.media.video import VideoMediaIO
from vllm.multimodal.parse import MultiModalDataParser

from aot_vllm.adapters import compat
from aot_vllm.errors import UnsupportedError
from demo.h264 import write_h264
from tests.frames.files import data_url, frames_file

PROCESSORS = [None, "LlavaOnevisionVideoProcessor", "Qwen2VLVideoProcessor", "Qwen3VLVideoProcessor"]


def pictures(frames=4, height=48, width=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


@pytest.fixture(params=["a new process", "a process that has it"])
def stock(request, monkeypatch):
    """Return vLLM's two methods as they are without the plugin; ours are in place after that."""
    methods = {}
    for name in ("load_bytes", "load_file"):
        method = getattr(VideoMediaIO, name)
        methods[name] = getattr(method, "__wrapped__", method)
        monkeypatch.setattr(VideoMediaIO, name, methods[name])
    for _ in range(1 if request.param == "a new process" else 3):
        compat.load_frames_files()
    return methods


@pytest.fixture
def connector(stock, tmp_path):
    return MediaConnector(allowed_local_media_path=str(tmp_path))


def placed(tmp_path, content, name="video.frames"):
    path = tmp_path / name
    path.write_bytes(content)
    return path.as_uri()


@pytest.mark.parametrize("processor", PROCESSORS)
async def test_a_frames_file_is_read_whatever_loader_vllm_has_for_the_processor(connector, tmp_path, processor):
    frames = pictures()
    urls = [
        placed(tmp_path, frames_file(frames, total=40)),
        placed(tmp_path, frames_file(frames, total=40), "without_extension"),
        data_url(frames_file(frames, total=40, compression="zlib")),
        data_url(frames_file(frames, total=40)),
    ]
    for url in urls:
        for fetched in (
            connector.fetch_video(url, video_processor=processor),
            await connector.fetch_video_async(url, video_processor=processor),
        ):
            read, metadata = fetched.media
            np.testing.assert_array_equal(read, frames)
            assert (metadata["video_backend"], metadata["total_num_frames"]) == ("aot_frames", 40)
            assert len(fetched.original_bytes) == 40


@pytest.mark.parametrize("settings", [{"num_frames": 2}, {"fps": 1, "min_frames": 2}, {"video_backend": "qwen2_vl"}])
def test_frames_are_not_sampled_again(stock, tmp_path, settings):
    connector = MediaConnector({"video": settings}, allowed_local_media_path=str(tmp_path))
    read, metadata = connector.fetch_video(placed(tmp_path, frames_file(pictures(9)))).media
    assert len(read) == len(metadata["frames_indices"]) == 9
    assert metadata["do_sample_frames"] is False


def clip(frames=12):
    file = io.BytesIO()
    write_h264(file, pictures(frames))
    return file.getvalue()


@pytest.mark.parametrize("processor", PROCESSORS)
def test_any_other_video_goes_to_vllms_own_loader_with_the_same_result(connector, stock, tmp_path, processor):
    content = clip()
    seen = []
    for url in (placed(tmp_path, content, "clip.mp4"), "data:video/mp4;base64," + base64.b64encode(content).decode()):
        fetched = connector.fetch_video(url, video_processor=processor)
        assert fetched.original_bytes == content
        seen.append(fetched.media)
    for name, method in stock.items():
        setattr(VideoMediaIO, name, method)
    frames, metadata = connector.fetch_video(url, video_processor=processor).media
    for other_frames, other_metadata in seen:
        np.testing.assert_array_equal(other_frames, frames)
        assert other_metadata == metadata


def test_frames_as_a_list_of_jpeg_pictures_go_to_vllms_own_loader(connector):
    jpeg = connector.fetch_video(
        "data:video/jpeg;base64," + VideoMediaIO(media.ImageMediaIO()).encode_base64(pictures(3))
    )
    assert jpeg.media[1]["video_backend"] == "jpeg_sequence"


@pytest.mark.parametrize("content", [b"", b"AOTFRM", b"no video at all"])
def test_what_is_no_frames_file_is_refused_by_vllm_as_ever(connector, tmp_path, content):
    with pytest.raises(ValueError, match="Could not open video stream"):
        connector.fetch_video(placed(tmp_path, content))


def test_a_bad_frames_file_is_a_value_error_that_says_why(connector, tmp_path):
    content = frames_file(pictures())
    for bad in (content[:-1], content[:100], content + b"\0"):
        for url in (placed(tmp_path, bad), data_url(bad)):
            with pytest.raises(ValueError, match=r"^(frames of 4 x 48 x 64 x 3 must take|the header of this frames)"):
                connector.fetch_video(url)
    with pytest.raises(FileNotFoundError):
        connector.fetch_video((tmp_path / "evicted.frames").as_uri())


def test_frames_outside_the_allowed_folder_are_refused(connector, tmp_path):
    other = tmp_path.parent / "elsewhere.frames"
    other.write_bytes(frames_file(pictures()))
    with pytest.raises(ValueError, match="must be a subpath"):
        connector.fetch_video(other.as_uri())


def test_frames_larger_than_vllm_allows_are_refused_like_any_video(connector, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_MAX_IMAGE_PIXELS", str(48 * 64 - 1))
    with pytest.raises(ValueError, match="exceed the maximum of 3071 pixels"):
        connector.fetch_video(placed(tmp_path, frames_file(pictures())))


@pytest.mark.parametrize("needs_metadata", [False, True])
def test_hashes_differ_with_content_and_metadata_and_only_with_these(connector, tmp_path, needs_metadata):
    parser = MultiModalDataParser(video_needs_metadata=needs_metadata)

    def hash_of(url):
        items = parser.parse_mm_data({"video": [connector.fetch_video(url)]})["video"]
        return MultiModalHasher.hash_kwargs("blake3", video=items.get_item_for_hash(0))

    frames = pictures()
    changed = frames.copy()
    changed[3, -1, -1, 2] ^= 1
    contents = [
        frames_file(frames),
        frames_file(changed),
        frames_file(frames, fps=7.0),
        frames_file(frames, total=50),
        frames_file(frames, indices=[0, 1, 1, 3]),
        frames_file(frames.reshape(4, 64, 48, 3)),
    ]
    hashes = [hash_of(placed(tmp_path, content)) for content in contents]
    assert len(set(hashes)) == len(contents)
    assert hashes == [hash_of(placed(tmp_path, content, "other_name")) for content in contents]
    assert hashes == [hash_of(data_url(content)) for content in contents]


@pytest.mark.parametrize("missing", ["load_bytes", "load_file", None])
def test_a_vllm_whose_videos_cannot_be_read_so_is_refused_by_name(monkeypatch, missing):
    if missing is None:
        monkeypatch.delattr(media, "VideoMediaIO")
    else:
        without = type("VideoMediaIO", (), {"load_bytes": None, "load_file": None})
        monkeypatch.setattr(media, "VideoMediaIO", without)
        setattr(without, {"load_bytes": "load_file", "load_file": "load_bytes"}[missing], lambda: None)
    with pytest.raises(
        UnsupportedError, match=r"has no VideoMediaIO\.load_bytes and load_file.*install vllm 0\.32\.\*"
    ):
        compat.load_frames_files()
