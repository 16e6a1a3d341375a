"""Every kernel becomes machine code for the GPUs that are served. No GPU is needed: triton comes with an assembler."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SPILLED_BYTES = 64
"""Most bytes that a thread may spill. Only attention in float32 spills at all, under 50 bytes on sm_90."""

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Most shared memory of a program."""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_kernel_compiles_within_its_registers(capability, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels.compile", str(capability)],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not {name: used for name, used in found.items() if used["spills"] > SPILLED_BYTES}
    assert not {name: used for name, used in found.items() if used["shared"] > SHARED_BYTES[capability]}
    chains = {name: used for name, used in found.items() if re.match(r"spread_out \d", name)}
    assert all(used["redux"] for used in chains.values())  # a reduction in a warp is one instruction
    assert found["spread_out 196"]["barriers"] == 0
    without_table = [used for name, used in found.items() if name.startswith("spread_out_without_table")]
    assert len(without_table) == 10
    assert all(used["registers"] * 16 * 32 <= 65536 for used in without_table)  # 16 warps of a program fit a processor
