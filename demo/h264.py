"""Write frames as H.264, and read them back as a model gets to see them."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import av
import numpy as np

FRAMES_PER_SECOND = 8
CRF = 16


def write_h264(file: Path | IO[bytes], pictures: Iterable[np.ndarray], *, crf: int = CRF) -> None:
    """Write frames, at least one, each (H, W, 3) uint8, as an mp4 of 8 frames a second.

    `crf` is the constant rate factor, in [0, 51]: the higher, the smaller and the worse.
    """
    target: Any = str(file) if isinstance(file, Path) else file
    with av.open(target, "w", format="mp4") as container:
        options = {"crf": str(crf), "preset": "veryfast", "threads": "1"}
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options=options)
        stream.pix_fmt = "yuv420p"
        for index, picture in enumerate(pictures):
            if index == 0:
                stream.height, stream.width = picture.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def through_h264(pictures: np.ndarray) -> np.ndarray:
    """Return the frames, (T, H, W, 3) uint8, as they come out of an H.264 file."""
    file = io.BytesIO()
    write_h264(file, pictures)
    file.seek(0)
    with av.open(file) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
