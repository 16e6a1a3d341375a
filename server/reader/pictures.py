"""From decoded frames to the pixels of a frames file: 8-bit RGB, as displayed, at the size that is asked for."""

from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from server.reader.sizes import Size

if TYPE_CHECKING:
    from av import VideoFrame
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]
    Matrix = NDArray[np.int32]

# ITU-T H.273's matrix coefficients as swscale knows them; BT.601 where a stream says nothing, as OpenCV has it.
_BT601, _BT709, _FCC, _SMPTE240M, _BT2020 = 5, 1, 4, 7, 9
_MATRICES = {1: _BT709, 4: _FCC, 7: _SMPTE240M, 9: _BT2020, 10: _BT2020}
_LIMITED_RANGE, _FULL_RANGE = 1, 2


class Pictures:
    """Makes pixels of the frames of one video, all of one size."""

    def __init__(self, size: Size) -> None:
        """Take the height and the width, as displayed."""
        from av.video.reformatter import VideoReformatter

        self._size = size
        self._reformatter = VideoReformatter()

    def pixels(self, frame: "VideoFrame") -> bytes:
        """Return height x width x 3 bytes. Scaling is bicubic, and filters what is made smaller."""
        layout = frame.format
        is_full = frame.color_range == _FULL_RANGE or layout.is_rgb or layout.name.startswith("yuvj")
        converted = self._reformatter.reformat(
            frame,
            format="rgb24",
            src_colorspace=_MATRICES.get(frame.colorspace, _BT601),
            src_color_range=_FULL_RANGE if is_full else _LIMITED_RANGE,
            dst_color_range=_FULL_RANGE,
            threads=1,
        )
        picture = oriented(converted.to_ndarray().astype(np.uint8, copy=False), _matrix(frame))
        height, width = self._size
        if picture.shape[:2] == (height, width):
            return picture.tobytes()
        image = Image.fromarray(np.ascontiguousarray(picture))
        return image.resize((width, height), Image.Resampling.BICUBIC).tobytes()


def is_turned(frame: "VideoFrame") -> bool:
    """Return whether the frame is displayed with its height as the width."""
    return _swaps(_matrix(frame))


def oriented(picture: "Pixels", matrix: "Matrix | None") -> "Pixels":
    """Return the picture as a display matrix has it shown, turned by right angles and mirrored.

    Column p and row q are displayed at column ap + cq and row bp + dq of [[a, b, u], [c, d, v], [x, y, w]].
    """
    if matrix is None:
        return picture
    (a, b, _), (c, d, _), _ = matrix.reshape(3, 3).tolist()
    if _swaps(matrix):
        picture, a, d = picture.transpose(1, 0, 2), c, b
    return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _swaps(matrix: "Matrix | None") -> bool:
    return matrix is not None and abs(int(matrix[1])) > abs(int(matrix[0]))


def _matrix(frame: "VideoFrame") -> "Matrix | None":
    from av.sidedata.sidedata import Type

    try:
        found: Any = frame.side_data
    except ValueError:  # PyAV knows no name for something else about the frame; of the matrix it tells the turn
        return _turning(frame.rotation)
    data = found.get(Type.DISPLAYMATRIX)
    return None if data is None else np.frombuffer(bytes(data), np.int32)


def _turning(degrees: int) -> "Matrix | None":
    """Return the matrix by which a frame is displayed turned to the left."""
    if degrees % 90:
        return None
    cos, sin = ((1, 0), (0, 1), (-1, 0), (0, -1))[degrees // 90 % 4]
    return np.array([cos, -sin, 0, sin, cos, 0, 0, 0, 1], np.int32) << 16
