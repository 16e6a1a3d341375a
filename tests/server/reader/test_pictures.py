"""What is in the pixels: colours, orientation, scaling."""

import io

import av
import numpy as np
import pytest
import pytest_asyncio
from PIL import Image

from server.media.readers import Reader
from tests.server.reader.reading import ALL_FRAMES, LIMITS, examine, frames_of
from tests.server.reader.recordings import HEIGHT, WIDTH, busy, number_of, recording, shown_by

pytestmark = pytest.mark.asyncio(loop_scope="module")

RED, GREEN, BLUE, GREY = (200, 30, 30), (30, 180, 30), (30, 30, 200), (128, 128, 128)
CORNERS = {"top left": RED, "top right": GREEN, "bottom left": BLUE, "bottom right": GREY}
FULL, LIMITED = 2, 1


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def reader():
    reader = Reader(limits=LIMITS, seconds=30, num_workers=1)
    yield reader
    reader.close()


def quarters(number, width, height):
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2], picture[: height // 2, width // 2 :] = RED, GREEN
    picture[height // 2 :, : width // 2], picture[height // 2 :, width // 2 :] = BLUE, GREY
    return picture


def corners(picture):
    height, width, _ = picture.shape
    places = {
        name: picture[height // 8 if "top" in name else -height // 8, width // 8 if "left" in name else -width // 8]
        for name in CORNERS
    }
    nearest = {colour: name for name, colour in CORNERS.items()}
    return [
        nearest[min(nearest, key=lambda colour: np.abs(np.subtract(colour, seen)).sum())] for seen in places.values()
    ]


@pytest.mark.parametrize(
    ("matrix", "seen"),
    [
        ((1, 0, 0, 1), ["top left", "top right", "bottom left", "bottom right"]),
        ((0, 1, -1, 0), ["bottom left", "top left", "bottom right", "top right"]),  # a quarter to the right
        ((-1, 0, 0, -1), ["bottom right", "bottom left", "top right", "top left"]),
        ((0, -1, 1, 0), ["top right", "bottom right", "top left", "bottom left"]),  # a quarter to the left
        ((-1, 0, 0, 1), ["top right", "top left", "bottom right", "bottom left"]),  # mirrored
        ((1, 0, 0, -1), ["bottom left", "bottom right", "top left", "top right"]),
        ((0, 1, 1, 0), ["top left", "bottom left", "top right", "bottom right"]),
    ],
)
async def test_a_video_is_read_as_it_is_shown(reader, matrix, seen):
    data = shown_by(recording("mp4", "libx264", 4, draw=quarters), *matrix)
    reading, pictures = await frames_of(reader, data, ALL_FRAMES)
    size = (WIDTH, HEIGHT) if matrix[0] else (HEIGHT, WIDTH)
    assert (reading.facts.width, reading.facts.height) == size
    assert (reading.header.source_width, reading.header.source_height) == size
    assert pictures.shape[1:3] == size[::-1]
    assert all(corners(picture) == seen for picture in pictures)


def coloured(codec, pix_fmt, colour, *, matrix, luma, is_full):
    """A video of one colour whose stream says by which matrix it was made: its number and its weights (ITU-T H.273)."""
    depth = 10 if "10" in pix_fmt else 8
    (red, blue), rgb = luma, np.array(colour) / 255
    brightness = red * rgb[0] + (1 - red - blue) * rgb[1] + blue * rgb[2]
    differences = (rgb[2] - brightness) / (2 - 2 * blue), (rgb[0] - brightness) / (2 - 2 * red)
    if is_full:
        values = [brightness * 255, *(128 + 255 * difference for difference in differences)]
    else:
        values = [16 + 219 * brightness, *(128 + 224 * difference for difference in differences)]
    values = [round(value * 2 ** (depth - 8)) for value in values]
    sizes = [WIDTH * HEIGHT, WIDTH * HEIGHT // 4, WIDTH * HEIGHT // 4]
    planes = np.concatenate([np.full(size, value) for size, value in zip(sizes, values, strict=True)])
    planes = planes.astype(np.uint16 if depth > 8 else np.uint8).reshape(-1, WIDTH)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pix_fmt
        stream.codec_context.colorspace = matrix
        stream.codec_context.color_range = FULL if is_full else LIMITED
        for _ in range(4):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format=pix_fmt)))
        output.mux(stream.encode(None))
    return buffer.getvalue()


BT601, BT709, BT2020 = (0.299, 0.114), (0.2126, 0.0722), (0.2627, 0.0593)


@pytest.mark.parametrize("colour", [RED, GREEN, BLUE])
@pytest.mark.parametrize(
    ("codec", "pix_fmt", "matrix", "luma", "is_full"),
    [
        ("libx264", "yuv420p", 2, BT601, False),
        ("libx264", "yuv420p", 6, BT601, False),
        ("libx264", "yuv420p", 1, BT709, False),
        ("libx264", "yuv420p", 1, BT709, True),
        ("libx265", "yuv420p10le", 9, BT2020, False),
        ("libx265", "yuv420p10le", 1, BT709, True),
    ],
)
async def test_colours_are_right_by_what_the_stream_says(reader, codec, pix_fmt, matrix, luma, is_full, colour):
    data = coloured(codec, pix_fmt, colour, matrix=matrix, luma=luma, is_full=is_full)
    _, pictures = await frames_of(reader, data, ALL_FRAMES)
    assert np.abs(pictures.mean(axis=(0, 1, 2)) - colour).max() <= 3  # swscale's rounding; another matrix is 10 off


async def test_what_is_transparent_is_shown_all_the_same(reader):
    data = recording("mov", "prores_ks", 4, pix_fmt="yuva444p10le", encoder=(("profile", "4"),))
    _, pictures = await frames_of(reader, data, ALL_FRAMES)
    assert [number_of(picture) for picture in pictures] == [0, 1, 2, 3]


@pytest.mark.parametrize("size", [(161, 63), (66, 50), (97, 33)])
async def test_odd_sizes_are_kept(reader, size):
    data = recording("matroska", "libx264", 4, size=size, pix_fmt="yuv444p")
    reading, pictures = await frames_of(reader, data, ALL_FRAMES)
    assert (reading.facts.width, reading.facts.height) == size
    assert [number_of(picture) for picture in pictures] == [0, 1, 2, 3]


async def test_pixels_that_are_no_squares_stay_as_they_are_stored(reader):
    data = recording("mp4", "libx264", 4, encoder=(("aspect", "4"),))
    facts = await examine(reader, data)
    assert (facts.width, facts.height) == (WIDTH, HEIGHT)


async def test_frames_are_scaled_down_as_pillow_does(reader):
    data = recording("mp4", "libx264", 8, size=(640, 360), draw=busy)
    _, whole = await frames_of(reader, data, ALL_FRAMES)
    reading, small = await frames_of(reader, data, ALL_FRAMES, size={"rule": "fixed", "height": 96, "width": 160})
    assert (reading.header.height, reading.header.width) == (96, 160)
    assert (reading.header.source_height, reading.header.source_width) == (360, 640)
    for picture, right in zip(small, whole, strict=True):
        scaled = Image.fromarray(right).resize((160, 96), Image.Resampling.BICUBIC)
        assert np.array_equal(picture, np.asarray(scaled))


@pytest.mark.parametrize(
    ("size", "handed_over"),
    [
        ({"rule": "fixed", "height": 384, "width": 384}, (64, 128)),
        ({"rule": "fixed", "height": 32, "width": 384}, (32, 128)),
        ({"rule": "smart_resize", "factor": 28, "min_pixels": 3136, "max_pixels": 4000, "over": "frame"}, (64, 128)),
        ({"rule": "smart_resize", "factor": 28, "min_pixels": 784, "max_pixels": 4000, "over": "frame"}, (28, 84)),
        ({"rule": "smart_resize", "factor": 28, "min_pixels": 10**6, "max_pixels": 10**7, "over": "frame"}, (64, 128)),
        (None, (64, 128)),
    ],
)
async def test_frames_are_never_made_larger(reader, size, handed_over):
    reading, pictures = await frames_of(reader, recording("mp4", "libx264"), size=size)
    assert (reading.header.height, reading.header.width) == pictures.shape[1:3] == handed_over
    assert [number_of(picture) for picture in pictures] == reading.header.frames_indices


async def test_frames_of_several_sizes_are_handed_over_at_the_largest(reader):
    small = recording("mpegts", "libx264", 24, 24, size=(64, 32))
    data = small + recording("mpegts", "libx264", 24, 24, options=(("output_ts_offset", "1"),))
    reading, pictures = await frames_of(reader, data, ALL_FRAMES)
    assert (reading.facts.width, reading.facts.height, reading.facts.frames) == (WIDTH, HEIGHT, 48)
    assert [number_of(picture) for picture in pictures] == [*range(24)] * 2
