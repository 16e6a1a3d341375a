"""The gateway's rules of sampling name the frames that vLLM's own loaders do, and its sizes are the processors'."""

import random

import pytest

from server.media.readers import Reader
from server.reader.sampling import Clip, Qwen2VL, Qwen3VL, Uniform
from server.reader.sizes import handed_over
from tests.server.reader.reading import LIMITS, frames_of
from tests.server.reader.recordings import busy, recording

video = pytest.importorskip("vllm.multimodal.video")
base = pytest.importorskip("vllm.multimodal.video_decoders.base")

RATES = (1, 7.5, 23.976, 24, 25, 29.97, 30, 59.94, 120)
COUNTS = [*range(2, 200), *random.Random(1).sample(range(200, 100_000), 200)]

pytestmark = pytest.mark.only_on("v1")


def loaders_indices(loader, total, rate, *, num_frames=-1, fps=-1.0, **kwargs):
    source = loader._prepare_source(base.VideoSourceMetadata(total, rate, total / rate))
    target = base.VideoTargetMetadata(num_frames, fps, 300)
    return loader.compute_frames_index_to_sample(source=source, target=target, **kwargs)


@pytest.mark.parametrize("rate", RATES)
def test_uniform_sampling_is_that_of_the_loader_opencv(rate):
    for total in [1, *COUNTS]:
        clip = Clip(total, rate, total / rate)
        for num_frames, fps in ((32, -1), (-1, -1), (8, 2), (1, -1), (64, 0.5)):
            right = loaders_indices(video.VideoBackend, total, rate, num_frames=num_frames, fps=fps)
            assert Uniform(num_frames, fps).indices(clip) == right, (total, num_frames, fps)


@pytest.mark.parametrize("rate", RATES)
def test_qwen2_vl_sampling_is_that_of_its_loader(rate):
    for total in COUNTS:
        clip = Clip(total, rate, total / rate)
        for fps, least, most, factor in (
            (2, 4, 768, 2),
            (1, 4, 32, 2),
            (30, 2, 768, 2),
            (0.7, 4, 700, 2),
            (4, 8, 99, 4),
        ):
            if total < factor:
                continue
            settings = {"min_frames": least, "max_frames": most}
            right = loaders_indices(
                video.Qwen2VLVideoBackend, total, rate, fps=fps, temporal_patch_size=factor, **settings
            )
            rule = Qwen2VL(fps=fps, frame_factor=factor, **settings)
            assert rule.indices(clip) == right, (total, fps, settings)


@pytest.mark.parametrize("rate", RATES)
def test_qwen3_vl_sampling_is_that_of_its_loader(rate):
    for total in COUNTS:
        clip = Clip(total, rate, total / rate)
        for fps, least, most in ((2, 4, 768), (1, 4, 32), (30, 2, 768), (0.7, 4, 700)):
            settings = {"min_frames": least, "max_frames": most}
            right = loaders_indices(video.Qwen3VLVideoBackend, total, rate, fps=fps, **settings)
            assert Qwen3VL(fps=fps, **settings).indices(clip) == right, (total, fps, settings)


async def test_frames_are_those_that_vllms_own_loader_decodes():
    data = recording("mp4", "libx264", 48, 24, encoder=(("g", "24"), ("bf", "3")), size=(320, 192), draw=busy)
    theirs, metadata = video.VideoBackend.load_bytes(data, num_frames=8)
    reader = Reader(limits=LIMITS, seconds=30, num_workers=1)
    try:
        reading, ours = await frames_of(reader, data, {"rule": "uniform", "num_frames": 8})
    finally:
        reader.close()
    header = reading.header
    assert header.frames_indices == metadata["frames_indices"]
    assert (header.total_num_frames, header.fps, header.duration) == (
        metadata["total_num_frames"],
        metadata["fps"],
        metadata["duration"],
    )
    assert abs(ours.astype(int) - theirs).mean() < 0.5


SIZES = [(720, 1280), (1080, 1920), (64, 128), (65, 49), (20, 30), (333, 777), (2160, 3840), (28, 28), (10, 1000)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_frames", [2, 8, 32, 768])
def test_a_smaller_size_leads_the_processors_to_the_same_one(size, num_frames):
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import smart_resize as over_frame
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as over_video

    frame = {"rule": "smart_resize", "factor": 28, "min_pixels": 56 * 56, "max_pixels": 602_112, "over": "frame"}
    new = handed_over(frame, size, num_frames=num_frames)
    limits = {"min_pixels": frame["min_pixels"], "max_pixels": frame["max_pixels"]}
    assert over_frame(*new, 28, **limits) == over_frame(*size, 28, **limits)
    assert new[0] <= size[0]
    assert new[1] <= size[1]

    whole = {"rule": "smart_resize", "factor": 32, "min_pixels": 4096, "max_pixels": 25_165_824, "over": "video"}
    new = handed_over(whole | {"temporal_factor": 2}, size, num_frames=num_frames)
    limits = {"min_pixels": whole["min_pixels"], "max_pixels": whole["max_pixels"], "temporal_factor": 2, "factor": 32}
    assert over_video(num_frames, *new, **limits) == over_video(num_frames, *size, **limits)
