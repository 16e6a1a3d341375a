"""Frames files as a gateway writes them."""

import base64
import json
import zlib

import numpy as np

from aot_vllm.frames import HEADER_START, MAGIC


def header(frames, *, indices=None, fps=8.0, total=None, compression=None):
    """Return the header for frames, (N, height, width, 3) uint8, taken at `indices`, by default one after the other."""
    indices = list(range(len(frames))) if indices is None else indices
    total = max(indices) + 1 if total is None else total
    return {
        "version": 1,
        "frames": len(frames),
        "height": frames.shape[1],
        "width": frames.shape[2],
        "compression": compression,
        "total_num_frames": total,
        "fps": fps,
        "duration": total / fps,
        "frames_indices": indices,
        "source_height": frames.shape[1],
        "source_width": frames.shape[2],
    }


def head(fields):
    """Return what stands before the frames: the magic, the length of the header, and the header with its padding."""
    text = json.dumps(fields).encode()
    text += b" " * (-(HEADER_START + len(text)) % 4096)
    return MAGIC + len(text).to_bytes(8, "little") + text


def frames_file(frames, **fields):
    """Return the content of a frames file; `fields` are those of `header`."""
    pixels = np.ascontiguousarray(frames).tobytes()
    return head(header(frames, **fields)) + (zlib.compress(pixels, 1) if fields.get("compression") else pixels)


def data_url(content):
    return "data:video/x-aot-frames;base64," + base64.b64encode(content).decode()
