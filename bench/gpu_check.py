"""The end-to-end tests with this machine's own kernels, on both model runners of vLLM: a verdict a line.

    python bench/gpu_check.py

On a machine with CUDA each runner is checked twice: in float32, step by step: answers must agree to four decimals.
Then, as it is served, in bfloat16 with compiled graphs: answers must agree up to a near tie, token counts and positions
exactly. Qwen3.5 is in bfloat16 both times. Positions are observed by hooks, which compiled graphs bypass, so those
tests always run step by step. On a CPU only the first check runs, and the kernels of Model Runner V2 are interpreted.
`-k` selects tests by name, as pytest does. The exit code is the number of checks that failed, at most 100; the last
line of output names the machine.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SUITES = ("test_reduction_in_vllm.py", "test_qwen_in_vllm.py", "test_qwen_positions.py", "test_engine_server.py")
MOST_FAILURES = 100


def pytest_runtest_logreport(report: Any) -> None:
    """Print a test's verdict: this module is also the plugin of the pytest that it starts."""
    if report.failed or report.skipped or report.when == "call":
        verdict = "FAIL" if report.failed else "SKIP" if report.skipped else "PASS"
        test = report.nodeid.rpartition("/")[2]
        print(f"{verdict}  {os.environ['AOT_CHECK']}  {test}  {report.duration:.1f} s", flush=True)
        if report.failed:
            print(f"      {str(report.longrepr).strip().splitlines()[-1][:300]}", flush=True)


def pytest_collectreport(report: Any) -> None:
    """Print the tests that could not be collected."""
    if report.failed:
        print(f"FAIL  {os.environ['AOT_CHECK']}  {report.nodeid}\n{report.longrepr}", flush=True)


def modes(*, cuda: bool) -> list[tuple[str, list[str]]]:
    """Return the checks on one runner: their names, and the options of the tests."""
    exact: tuple[str, list[str]] = ("float32 step by step", [])
    return [exact, ("bfloat16 with graphs", ["--dtype", "bfloat16", "--graphs"])] if cuda else [exact]


def check(runner: str, name: str, options: list[str], chosen: str | None) -> int:
    """Run the tests on one runner in one mode, in a process of its own; return how many failed."""
    command = [sys.executable, "-m", "pytest", "--strict-markers", "-o", "addopts=", "-p", "bench.gpu_check"]
    command += ["-p", "no:terminal", "-p", "no:cacheprovider", "--runner", runner, *options]
    command += [f"tests/e2e/{suite}" for suite in SUITES] + ([] if chosen is None else ["-k", chosen])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "AOT_CHECK": f"{runner}  {name}"}
    failed = 0
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(("PASS", "FAIL", "SKIP", "      ")):
                print(line, end="", flush=True)
            failed += line.startswith("FAIL")
    if process.returncode not in (0, 1):
        print(f"FAIL  {runner}  {name}  pytest ended with {process.returncode}", flush=True)
        failed += 1
    return failed


def main() -> int:
    """Check everything; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runner", choices=["v1", "v2"], action="append", help="by default both")
    parser.add_argument("-k", dest="chosen", help="only tests whose names fit, as pytest's -k")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import torch

    from bench.machine import describe

    cuda = torch.cuda.is_available()
    failed = sum(
        check(runner, name, options, arguments.chosen)
        for runner in arguments.runner or ["v1", "v2"]
        for name, options in modes(cuda=cuda)
    )
    device = torch.cuda.get_device_name() if cuda else "no CUDA"
    versions = f"torch {torch.__version__}, vLLM {importlib.metadata.version('vllm')}"
    print(f"{failed or 'none'} failed. {device}, {describe(versions)}")
    return min(failed, MOST_FAILURES)


if __name__ == "__main__":
    sys.exit(main())
