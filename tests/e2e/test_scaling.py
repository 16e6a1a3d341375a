"""Frames that the gateway has scaled give a model's processor the pixels that full-size frames give it."""

import math

import numpy as np
import pytest
import pytest_asyncio
from PIL import Image

from server.media.readers import Reader
from tests.server.reader.reading import LIMITS, frames_of
from tests.server.reader.recordings import recording

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.any_runner, pytest.mark.asyncio(loop_scope="module")]

LEAST_DECIBELS = 55
FRAMES = 4
CLIPS = {
    "480p": ((854, 480), "yuv420p"),
    "720p": ((1280, 720), "yuv420p"),
    "portrait": ((720, 1280), "yuv420p"),
    "odd": ((641, 361), "yuv444p"),
    "narrow": ((270, 480), "yuv420p"),  # to be made smaller one way and larger the other
    "tall and odd": ((333, 1001), "yuv444p"),
}
AS_PIXELS = {"do_normalize": False, "do_sample_frames": False}
PROCESSORS = {
    "llava_onevision": (
        lambda: transformers.LlavaOnevisionVideoProcessor(size={"height": 384, "width": 384}, **AS_PIXELS),
        {"rule": "fixed", "height": 384, "width": 384},
    ),
    "qwen2_vl": (
        lambda: transformers.Qwen2VLVideoProcessor(
            size={"shortest_edge": 56 * 56, "longest_edge": 200_704}, patch_size=14, **AS_PIXELS
        ),
        {"rule": "smart_resize", "factor": 28, "min_pixels": 56 * 56, "max_pixels": 200_704, "over": "frame"},
    ),
    "qwen3_vl": (
        lambda: transformers.Qwen3VLVideoProcessor(
            size={"shortest_edge": 4096, "longest_edge": 1_000_000}, patch_size=16, **AS_PIXELS
        ),
        {
            "rule": "smart_resize",
            "factor": 32,
            "min_pixels": 4096,
            "max_pixels": 1_000_000,
            "over": "video",
            "temporal_factor": 2,
        },
    ),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def reader():
    reader = Reader(limits=LIMITS, seconds=60, num_workers=1)
    yield reader
    reader.close()


def scene(number, width, height):
    """A sky that brightens, hills with a texture, a sharp-edged disc that moves, and a fence of thin stripes."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    picture = np.stack([90 + 90 * y / height, 120 + 60 * y / height, 220 - 90 * y / height], axis=2)
    ground = y > height * (0.6 + 0.08 * np.sin(5 * x / width + number / 9))
    texture = sum(
        np.sin(x * frequency + y * frequency / 3 + frequency) / frequency**0.5 for frequency in (0.07, 0.3, 1.1)
    )
    picture[ground] = np.stack([70 + 14 * texture, 110 + 18 * texture, 50 + 9 * texture], axis=2)[ground]
    picture[(x - width * (0.2 + 0.1 * number)) ** 2 + (y - height * 0.3) ** 2 < (min(width, height) / 6) ** 2] = (
        250,
        200,
        60,
    )
    picture[(x % 9 < 3) & (abs(y - height * 0.85) < height * 0.05)] = 40, 30, 25
    return picture.clip(0, 255).astype(np.uint8)


def clip(name):
    size, pix_fmt = CLIPS[name]
    return recording("matroska", "libx264", FRAMES, size=size, pix_fmt=pix_fmt, draw=scene, encoder=(("crf", "12"),))


def processed(processor, pictures):
    return processor([torch.from_numpy(pictures.copy()).permute(0, 3, 1, 2)], return_tensors="pt")[
        "pixel_values_videos"
    ]


def decibels(right, ours):
    """The peak signal-to-noise ratio of what a processor makes, whose peak is 1."""
    return -10 * math.log10(max((right - ours).double().square().mean().item(), 1e-12))


@pytest.mark.parametrize("model", PROCESSORS)
@pytest.mark.parametrize("name", CLIPS)
async def test_scaled_frames_are_to_a_processor_what_full_size_frames_are(reader, name, model):
    make, rule = PROCESSORS[model]
    processor, sampling = make(), {"rule": "uniform", "num_frames": FRAMES}
    _, whole = await frames_of(reader, clip(name), sampling)
    reading, scaled = await frames_of(reader, clip(name), sampling, size=rule)
    assert scaled[0].size < whole[0].size
    assert (reading.header.source_width, reading.header.source_height) == CLIPS[name][0]
    right, ours = processed(processor, whole), processed(processor, scaled)
    assert right.shape == ours.shape
    assert 0.9 < right.max() <= 1
    assert decibels(right, ours) >= LEAST_DECIBELS


async def test_frames_scaled_by_another_filter_are_told_from_them(reader):
    make, rule = PROCESSORS["llava_onevision"]
    _, whole = await frames_of(reader, clip("720p"), {"rule": "uniform", "num_frames": FRAMES})
    size = rule["width"], rule["height"]
    others = [np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR)) for picture in whole]
    assert decibels(processed(make(), whole), processed(make(), np.stack(others))) < LEAST_DECIBELS - 5
