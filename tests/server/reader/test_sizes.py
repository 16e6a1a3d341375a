import pytest

from server.reader.sizes import handed_over

FRAME = {"rule": "smart_resize", "factor": 28, "min_pixels": 3136, "max_pixels": 602_112, "over": "frame"}
VIDEO = {
    "rule": "smart_resize",
    "factor": 32,
    "min_pixels": 4096,
    "max_pixels": 25_165_824,
    "over": "video",
    "temporal_factor": 2,
}


@pytest.mark.parametrize(
    ("told", "size", "num_frames", "right"),
    [
        (None, (720, 1280), 32, (720, 1280)),
        ({"rule": "fixed", "height": 384, "width": 384}, (720, 1280), 32, (384, 384)),
        ({"rule": "fixed", "height": 384, "width": 384}, (240, 1280), 32, (240, 384)),
        (FRAME, (720, 1280), 32, (560, 1008)),
        (FRAME, (30, 40), 32, (30, 40)),  # to be made larger
        (FRAME, (10, 2001), 32, (10, 2001)),  # refused by the processor, which says so itself
        (VIDEO, (720, 1280), 2, (704, 1280)),
        (VIDEO, (720, 1280), 768, (128, 224)),
        (VIDEO, (720, 1280), 1, (720, 1280)),  # refused by the processor
        (VIDEO, (20, 300), 8, (20, 300)),
    ],
)
def test_frames_are_made_as_small_as_the_processor_would(told, size, num_frames, right):
    assert handed_over(told, size, num_frames=num_frames) == right


def test_a_rule_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="rule must be one of fixed, smart_resize, got crop"):
        handed_over({"rule": "crop"}, (1, 1), num_frames=1)
