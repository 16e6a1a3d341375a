"""What the header of an image says."""

import os

from PIL import Image

from server.reader.facts import Facts, ReadError
from server.reader.frames_file import BYTES_PER_PIXEL

MAX_IMAGE_PIXELS = 2**26
_IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")


def read_image(descriptor: int) -> Facts:
    """Return the facts about the image in an open file, from its header; raise ReadError if it is too large."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    with (
        os.fdopen(descriptor, "rb", closefd=False) as file,
        Image.open(file, formats=_IMAGE_FORMATS) as image,
    ):
        if image.width * image.height > MAX_IMAGE_PIXELS:
            raise ReadError(
                f"the image has {image.width} x {image.height} pixels, at most {MAX_IMAGE_PIXELS} are allowed",
                code="media_too_large",
            )
        return Facts(
            container=str(image.format).lower(),
            codec="",
            width=image.width,
            height=image.height,
            decoded_bytes=image.width * image.height * BYTES_PER_PIXEL,
        )
