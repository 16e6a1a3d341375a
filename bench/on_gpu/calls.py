"""What is measured of a call: time, launches, waits and memory."""

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def synchronise(device: torch.device) -> None:
    """Wait until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: torch.device, *, repeats: int) -> dict[str, float]:
    """Return the median, lowest and highest milliseconds, and after how many the host has handed over all work.

    A call that takes long is repeated less often, for about 3 seconds in all and at least 3 times.
    """
    walls, hosts = [], []
    call()
    for repeat in range(repeats):
        synchronise(device)
        start = time.perf_counter()
        call()
        hosts.append((time.perf_counter() - start) * 1e3)
        synchronise(device)
        walls.append((time.perf_counter() - start) * 1e3)
        if repeat >= 2 and sum(walls) > 3e3:
            break
    return {"ms": statistics.median(walls), "low": min(walls), "high": max(walls), "host_ms": statistics.median(hosts)}


@contextmanager
def counted_waits(device: torch.device) -> Iterator[list[Any]]:
    """Yield a list that has, at the end, an entry for each time the host waited for the GPU; none without CUDA."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        waits: list[Any] = []
        try:
            yield waits
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            waits.extend(warning for warning in caught if "called a synchronizing" in str(warning.message))


def check_counting(device: torch.device) -> None:
    """Raise `RuntimeError` if a wait is not counted on this device: a column of zeros would say nothing."""
    with counted_waits(device) as waits:
        torch.ones(1, device=device).item()
    if device.type == "cuda" and not waits:
        raise RuntimeError("this torch does not report where the host waits for the GPU")


class Launches(TorchDispatchMode):
    """Counts the operations that a GPU would be given: all but views and allocations."""

    NOTHING = ("empty", "new_empty", "_unsafe_view", "_reshape_alias", "_local_scalar_dense")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:  # inference mode hands over composite operations whole
            parts = func.decompose(*args, **(kwargs or {}))
        if parts is not NotImplemented:
            return parts
        is_view = any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns)
        self.count += not is_view and not func.overloadpacket.__name__.startswith(self.NOTHING)
        return func(*args, **(kwargs or {}))


@contextmanager
def own_launches() -> Iterator[list[str]]:
    """Yield the list of names of the Triton kernels that are launched meanwhile; `Launches` does not see them."""
    from aot_vllm.kernels import anchors, attention, calibration, coverage, lengths, transport
    from aot_vllm.kernels.launch import launch

    launched: list[str] = []

    def counted(kernel: Any, *arguments: Any, **options: Any) -> None:
        launched.append(kernel.__name__)
        launch(kernel, *arguments, **options)

    with ExitStack() as patches:
        for module in (anchors, attention, calibration, coverage, lengths, transport):
            patches.enter_context(patch.object(module, "launch", counted))
        yield launched


def device_work(call: Callable[[], object], device: torch.device) -> dict[str, float | None]:
    """Return the kernels and copies of a call and the milliseconds in which they keep a GPU busy.

    Without CUDA it is the operations of the call, and nothing is known of copies and time.
    """
    if device.type != "cuda":
        with Launches() as seen:
            call()
        return {"launches": seen.count, "copies": None, "busy_ms": None}
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        synchronise(device)
    work = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    copies = sum("Memcpy" in event.name for event in work)
    busy = sum(event.device_time for event in work) / 1e3
    return {"launches": len(work) - copies, "copies": copies, "busy_ms": busy}


def added_memory(call: Callable[[], object], device: torch.device) -> float | None:
    """Return the MiB by which a call raises the GPU's memory in use at its peak."""
    if device.type != "cuda":
        return None
    synchronise(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronise(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20
