"""The one place that asks what the machine has: which algorithms compute a reduction."""

from functools import lru_cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch

from aot_vllm.core.algorithms import TORCH, Algorithms
from aot_vllm.errors import SettingError

Kernels = Literal["auto", "triton", "torch"]
"""`auto`: Triton on an NVIDIA GPU if it is installed, otherwise PyTorch. The other two force one of them."""


def check_kernels(value: object) -> Kernels:
    """Return `value`; raises `SettingError` for anything but a choice of kernels."""
    if value not in get_args(Kernels):
        raise SettingError(f"kernels must be one of {', '.join(get_args(Kernels))}, got {value!r}")
    return value  # type: ignore[return-value]


def algorithms_for(device: torch.device, *, kernels: Kernels = "auto") -> Algorithms:
    """Return the algorithms that compute reductions of tensors on `device`.

    Results are the same up to rounding. Raises `SettingError` for an unknown choice, and where Triton is forced but not
    installed.
    """
    check_kernels(kernels)
    if kernels == "torch" or (kernels == "auto" and not _is_served_by_triton(device)):
        return TORCH
    if not _has_triton():
        raise SettingError("kernels must be 'auto' or 'torch' where triton is not installed, got 'triton'")
    return _triton()


def _is_served_by_triton(device: torch.device) -> bool:
    """Return whether the kernels were written for this device: an NVIDIA GPU of compute capability 8.0 or later."""
    if device.type != "cuda" or torch.version.cuda is None or not _has_triton():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return find_spec("triton") is not None


@lru_cache(maxsize=1)
def _triton() -> Algorithms:
    """Return the algorithms in Triton. This loads triton."""
    from aot_vllm.kernels.anchors import select_diverse_anchors
    from aot_vllm.kernels.attention import attention_received
    from aot_vllm.kernels.calibration import token_weights
    from aot_vllm.kernels.coverage import select_covering_anchors
    from aot_vllm.kernels.transport import absorb_frames

    return Algorithms(
        select_diverse_anchors=select_diverse_anchors,
        select_covering_anchors=select_covering_anchors,
        token_weights=token_weights,
        absorb_frames=absorb_frames,
        attention_received=attention_received,
    )
