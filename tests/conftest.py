"""Options of the whole suite: which of vLLM's model runners the tests with a real engine use."""

import os
import sys
from pathlib import Path

TRITON_INTERPRETER = Path(__file__).parent / "triton_interpreter"

ENGINE_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "aot",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
}


def pytest_addoption(parser):
    parser.addoption(
        "--runner", choices=["v1", "v2"], default="v1", help="vLLM model runner of the tests with a real engine"
    )


def pytest_configure(config):
    """Settle the environment before anything imports vLLM: half of it is read at import."""
    os.environ.update(ENGINE_ENVIRONMENT)
    if config.getoption("--runner") == "v2":
        os.environ.update(VLLM_USE_V2_MODEL_RUNNER="1", TRITON_INTERPRET="1")
        sys.path.insert(0, str(TRITON_INTERPRETER))
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [str(TRITON_INTERPRETER), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
    else:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
