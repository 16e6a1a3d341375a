"""An engine that is asked without a gateway refuses videos of which it would see less than there is."""

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.multimodal import video

from aot_vllm.adapters import compat
from aot_vllm.adapters.decoded import count_pictures, missing_frames
from aot_vllm.errors import UnsupportedError
from tests.server.reader.recordings import recording, shown_by, without_packet

LOADERS = {
    "uniform": (video.VideoBackend, {"num_frames": 32}),
    "qwen2": (video.Qwen2VLVideoBackend, {"fps": 2}),
    "qwen3": (video.Qwen3VLVideoBackend, {"fps": 2}),
}
FRAGMENTS = (("movflags", "frag_keyframe"),)  # the header lies in front of the first fragment, and counts it alone
HEALTHY = {
    "mp4": recording("mp4", "libx264", 48, 8),
    "fragments": recording("mp4", "libx264", 48, 8, options=(("movflags", "empty_moov+frag_keyframe"),)),
    "webm": recording("webm", "libvpx-vp9", 48, 8),
    "matroska": recording("matroska", "mpeg4", 48, 8),
    "transport stream": recording("mpegts", "libx264", 48, 8, encoder=(("bf", "0"),)),
    "turned": shown_by(recording("mp4", "libx264", 48, 8), 0, 1, -1, 0),
    "bidirectional": recording("mp4", "libx264", 48, 8, encoder=(("bf", "3"),)),
}
SHORT = {
    "fragments after the first": recording("mp4", "libx264", 240, 24, options=FRAGMENTS, encoder=(("g", "24"),)),
    "webm without a length": recording("webm", "libvpx", 240, 24, options=(("live", "1"),)),
    "frames that OpenCV can't reach": recording("mpegts", "libx264", 48, 8, encoder=(("bf", "3"),)),
    "cut off": recording("matroska", "mpeg4", 48, 8)[:-4000],
    "lost packet": without_packet(recording("mpegts", "libx264", 96, 24)),
    "one frame": recording("mp4", "libx264", 1, 8),
}


@pytest.fixture
def guarded():
    compat.refuse_missing_frames(missing_frames)


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", HEALTHY)
def test_a_video_that_is_read_whole_is_taken(name, loader):
    backend, kwargs = LOADERS[loader]
    frames, metadata = backend.load_bytes(HEALTHY[name], **kwargs)
    assert metadata["total_num_frames"] == 48
    assert len(frames) == {"uniform": 32, "qwen2": 12, "qwen3": 12}[loader]


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", SHORT)
def test_a_video_of_which_less_would_be_seen_than_there_is_is_refused_or_seen_whole(name, loader):
    backend, kwargs = LOADERS[loader]
    data = SHORT[name]
    refusal = None
    try:
        frames, metadata = backend.load_bytes(data, **kwargs)
    except VLLMValidationError as exc:
        refusal = exc
    if refusal is None:
        assert len(frames) >= 4
        assert metadata["total_num_frames"] >= 0.75 * count_pictures(data)
    else:
        assert refusal.parameter == "video_url"
        assert any(words in str(refusal) for words in ("could be decoded", "announces", "could not be read"))


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fragments after the first", r"announces \d+ frames but holds 240"),
        ("webm without a length", r"announces 0 frames but holds 240"),
    ],
)
def test_a_header_that_hides_most_of_a_video_is_told(name, words):
    with pytest.raises(VLLMValidationError, match=words):
        video.VideoBackend.load_bytes(SHORT[name], num_frames=32)


def test_frames_that_could_not_be_decoded_are_counted():
    told = missing_frames(b"", announced=10, sampled=[0, 3, 3, 6], num_read=2)
    assert told.startswith("only 2 of the 3 frames sampled from the video could be decoded")
    assert missing_frames(b"", announced=10, sampled=[0, 3, 3, 6], num_read=3) is None


@pytest.mark.parametrize("data", [b"", b"no video", recording("mp4", "libx264", has_video=False, sound_seconds=1)])
def test_what_holds_no_video_has_no_count(data):
    assert count_pictures(data) is None


def test_it_is_wrapped_once_and_a_vllm_without_the_function_is_refused_by_name(monkeypatch):
    original = video.decode_video
    compat.refuse_missing_frames(missing_frames)
    wrapped = video.decode_video
    compat.refuse_missing_frames(missing_frames)
    assert video.decode_video is wrapped
    assert wrapped.__wrapped__ is original
    monkeypatch.delattr(video, "decode_video")
    with pytest.raises(UnsupportedError, match=r"no vllm\.multimodal\.video\.decode_video"):
        compat.refuse_missing_frames(missing_frames)
