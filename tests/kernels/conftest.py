"""What the tests of the kernels share: the device they run on, the algorithms, and poisoned outputs."""

import pytest
import torch


@pytest.fixture(scope="session")
def device():
    """Return the GPU, or the CPU where Triton's interpreter stands in for it."""
    pytest.importorskip("triton")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def kernels(device):
    """Return the algorithms in Triton."""
    import triton

    from aot_vllm.kernels.dispatch import algorithms_for

    if device.type == "cpu" and not triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET was not set before triton was imported")
    return algorithms_for(device, kernels="triton")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fill new memory with NaN and with numbers out of range: a kernel must write all of its output."""
    original = torch.empty

    def empty(*size, **kwargs):
        made = original(*size, **kwargs)
        if made.device.type == "meta":
            return made
        if made.is_floating_point():
            return made.fill_(torch.nan)
        return made.fill_(True) if made.dtype == torch.bool else made.fill_(-(2**30))

    monkeypatch.setattr(torch, "empty", empty)
