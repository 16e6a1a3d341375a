"""Where a number was measured: the line that stands beside every table."""

import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def describe(*versions: str) -> str:
    """Return processor, cores, Python, the given versions and the commit, marked if the tree has changes."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    processor = models[0] if models else platform.processor() or platform.machine()
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    measured = ["aot_vllm", "server", "bench", "demo", ":!bench/results"]
    changed = subprocess.run([*git, "status", "--porcelain", "--", *measured], capture_output=True).stdout
    state = "+changes" if changed.strip() else ""
    return ", ".join(
        [
            f"{processor}, {os.cpu_count()} cores",
            f"Python {platform.python_version()}",
            *versions,
            f"commit {commit or 'unknown'}{state}",
        ]
    )


def engine_versions() -> str:
    """Return the versions of torch and vLLM, which a process of its own imports: both start threads."""
    code = "import torch, vllm; print(f'torch {torch.__version__}, vLLM {vllm.__version__}')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]
