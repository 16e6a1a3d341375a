"""Engines of vLLM as it ships, one after another, each in a process forked off one in which vLLM is imported already.

An import takes as long as several starts. The plugin is kept out by VLLM_PLUGINS.
"""

import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]


def run_stock(module, specs):
    """Run a module of this folder that calls `each_in_a_fork`; return what became of each spec."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.e2e.{module}"],
        cwd=ROOT,
        env={**os.environ, "VLLM_PLUGINS": ""},
        input=json.dumps(specs),
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    runs = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"returncode"')]
    assert len(runs) == len(specs), done.stderr[-3000:]
    return [SimpleNamespace(**run) for run in runs]


def each_in_a_fork(run):
    """Call `run` with each spec that comes on stdin; print its exit code and what it printed, a JSON line for each."""
    import vllm.entrypoints.llm  # noqa: F401 - what the forks share

    for spec in json.load(sys.stdin):
        with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
            if (fork := os.fork()) == 0:
                os.dup2(stdout.fileno(), 1)
                os.dup2(stderr.fileno(), 2)
                run_and_exit(run, spec)
            _, status = os.waitpid(fork, 0)
            stdout.seek(0)
            stderr.seek(0)
            seen = {"returncode": os.waitstatus_to_exitcode(status), "stdout": stdout.read(), "stderr": stderr.read()}
        print(json.dumps(seen), flush=True)


def run_and_exit(run, spec):
    """End this process, whatever threads an engine has left in it."""
    status = 0
    try:
        run(spec)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
