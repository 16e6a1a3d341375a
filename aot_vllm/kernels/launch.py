"""Starting a kernel, and the matrix products that kernels read."""

from typing import Any

import torch
import triton
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Start a kernel on the device of its first argument, a tensor. On the meta device nothing runs."""
    device = arguments[0].device
    if device.type == "meta":
        return
    if device.type != "cuda":  # Triton's interpreter
        kernel[grid](*arguments, **options)
        return
    with torch.cuda.device(device):
        kernel[grid](*arguments, **options)


def product(x_BMD: Tensor, y_BND: Tensor) -> Tensor:
    """Return the products of all pairs of vectors, (B, M, N), in float32.

    Products of two half-precision numbers are exact in float32, and they are summed in float32. No float32 copy of the
    features is made on a GPU.
    """
    if x_BMD.dtype in (torch.float16, torch.bfloat16) and x_BMD.device.type != "cpu":
        return torch.bmm(x_BMD, y_BND.transpose(1, 2), out_dtype=torch.float32)
    return torch.bmm(x_BMD.float(), y_BND.transpose(1, 2).float())


def power_of_2(size: int, *, least: int = 1) -> int:
    """Return the next power of 2 that is at least `size` and `least`: Triton's blocks have such sizes."""
    return max(least, int(triton.next_power_of_2(size)))
