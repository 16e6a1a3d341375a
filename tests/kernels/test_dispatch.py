import subprocess
import sys

import pytest
import torch

from aot_vllm.core.algorithms import TORCH
from aot_vllm.errors import SettingError
from aot_vllm.kernels import dispatch
from aot_vllm.kernels.dispatch import algorithms_for

CPU = torch.device("cpu")


def test_on_a_cpu_pytorch_computes_reductions_and_triton_is_not_loaded():
    check = (
        "import torch, sys; from aot_vllm.kernels.dispatch import algorithms_for; "
        "algorithms_for(torch.device('cpu')); print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_what_is_not_forced_falls_back_to_pytorch(kernels):
    assert algorithms_for(CPU, kernels=kernels) is TORCH


def test_an_nvidia_gpu_has_triton_if_it_is_installed_and_recent(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu = torch.device("cuda", 0)
    assert algorithms_for(gpu) is algorithms_for(gpu, kernels="triton") is not TORCH
    assert algorithms_for(gpu, kernels="torch") is TORCH
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert algorithms_for(gpu) is TORCH


def test_without_triton_the_reduction_works_and_forcing_triton_is_refused(monkeypatch):
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert algorithms_for(torch.device("cuda", 0)) is TORCH
    with pytest.raises(SettingError, match="where triton is not installed"):
        algorithms_for(CPU, kernels="triton")


@pytest.mark.parametrize("kernels", ["cuda", None, True])
def test_an_unknown_choice_is_refused(kernels):
    with pytest.raises(SettingError, match="kernels must be one of auto, triton, torch, got"):
        algorithms_for(CPU, kernels=kernels)
