"""lmms-eval, unpatched, through the gateway into real vLLM: the run that a GPU host does, on the embedded clips."""

import re
import subprocess
import sys

import pytest

from demo.tiny_checkpoints import ROOT
from tests.e2e.with_gateway.clients import environment

pytestmark = [pytest.mark.any_runner, pytest.mark.slow]


@pytest.fixture
def run(tmp_path):
    def start(*arguments):
        command = [sys.executable, "bench/accuracy.py", f"--evaluator={environment.lmms_eval()}", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)

    return start


def test_lmms_eval_asks_every_question_whole_and_reduced(run):
    done = run("--local=2", "--retentions", "1.0", "0.1")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = re.findall(r"^\| (\d+)% \| ([\d,]+) of ([\d,]+) \| ([\d.]+) \|$", done.stdout, re.MULTILINE)
    asked = int(re.search(r"(\d+) questions at each retention", done.stdout)[1])
    assert [(kept, after, before) for kept, after, before, _ in rows] == [
        ("100", f"{577 * asked:,}", f"{577 * asked:,}"),
        ("10", f"{59 * asked:,}", f"{577 * asked:,}"),
    ]
    assert float(rows[0][3]) > 70


def test_a_question_without_an_answer_ends_the_run(run, unused_tcp_port):
    done = run("--local=1", "--limit=1", f"--gateway=http://127.0.0.1:{unused_tcp_port}")
    assert done.returncode != 0
    assert "1 of 1 questions got no answer" in done.stderr
