"""Videos made for the tests."""

import base64
import functools
import io

import av
import numpy as np


@functools.cache
def clip(container: str = "mp4", codec: str = "mpeg4", frames: int = 12, fps: int = 6) -> bytes:
    """A small moving gradient."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(frames):
            picture = np.full((48, 64, 3), (i * 9) % 256, np.uint8)
            picture[:, : (i * 5) % 64] = 255
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def data_url(data: bytes, mime: str = "video/mp4") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
