"""The driver half: one device, the CPU."""

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from interpreted_triton.bfloat16 import calculate_in_bfloat16


class InterpretedDriver(DriverBase):
    def __init__(self):
        calculate_in_bfloat16()

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_current_target(self):
        return GPUTarget("cpu", 0, 1)

    def get_current_device(self):
        return 0

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device=0):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu

    def get_benchmarker(self):
        raise RuntimeError("interpreted kernels are not benchmarked")

    def get_empty_cache_for_benchmark(self):
        return None

    def clear_cache(self, cache):
        pass
