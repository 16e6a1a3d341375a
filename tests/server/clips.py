"""Generates the media for the tests."""

import base64
import contextlib
import functools
import io
import os
import wave
from fractions import Fraction

import av
import numpy as np
from PIL import Image


@functools.cache
def clip(
    container: str = "mp4",
    codec: str = "mpeg4",
    frames: int = 12,
    fps: int = 6,
    *,
    size: tuple[int, int] = (64, 48),
    pix_fmt: str = "yuv420p",
    options: tuple[tuple[str, str], ...] = (),
) -> bytes:
    """A small video with a moving edge."""
    width, height = size
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container, options=dict(options)) as output, as_scheduled_before():
        stream = output.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        for i in range(frames):
            picture = np.full((height, width, 3), (i * 9) % 256, np.uint8)
            picture[:, : (i * 5) % 64] = 255
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def longer_than_an_argument() -> bytes:
    """The small video, longer than Linux lets an argument of a command be, by an MP4 box that means nothing."""
    size = 200_000
    return clip() + size.to_bytes(4, "big") + b"free" + bytes(size - 8)


@functools.cache
def growing(container: str, codec: str, *sizes: tuple[int, int], pix_fmt: str = "yuv420p", each: int = 4) -> bytes:
    """A grey video whose frame size changes within the stream. The container's header knows only the first size."""
    buffer, rate = io.BytesIO(), Fraction(1, 6)
    with av.open(buffer, "w", format=container) as output, as_scheduled_before():
        stream = output.add_stream(codec, rate=6)
        (stream.width, stream.height), stream.pix_fmt = sizes[0], pix_fmt
        for part, (width, height) in enumerate(sizes):
            encoder = av.CodecContext.create(codec, "w")
            encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = width, height, pix_fmt, rate
            encoder.options = {"bf": "0"} if codec in ("libx264", "libx265") else {}
            pictures = [av.VideoFrame.from_ndarray(np.full((height, width, 3), 90, np.uint8), format="rgb24")] * each
            for number, picture in enumerate([*pictures, None]):
                if picture is not None:
                    picture.pts, picture.time_base = number, rate
                for packet in encoder.encode(picture):
                    copy = av.Packet(bytes(packet))
                    copy.pts = copy.dts = packet.pts + part * each
                    copy.time_base, copy.duration, copy.stream = rate, 1, stream
                    copy.is_keyframe = packet.is_keyframe
                    output.mux(copy)
    return buffer.getvalue()


@contextlib.contextmanager
def as_scheduled_before():
    """Restore the thread's scheduling policy: SVT-AV1 makes the calling thread and its children real-time if it may."""
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


@functools.cache
def picture(width: int = 16, height: int = 16, kind: str = "PNG") -> bytes:
    """A grey image."""
    buffer = io.BytesIO()
    Image.new("L", (width, height), 128).save(buffer, kind)
    return buffer.getvalue()


@functools.cache
def sound(seconds: float = 0.5, rate: int = 8000) -> bytes:
    """A WAV file with silence."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as output:
        output.setnchannels(1)
        output.setsampwidth(2)
        output.setframerate(rate)
        output.writeframes(b"\0\0" * int(seconds * rate))
    return buffer.getvalue()


def data_url(data: bytes, mime: str = "video/mp4") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
