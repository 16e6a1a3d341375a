"""The demo as a visitor runs it, on a tiny checkpoint: its table, its exit code, and that nothing is left running."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from demo.clip import write_clip
from demo.task import KINDS
from demo.tiny_checkpoints import ROOT, checkpoint

pytestmark = pytest.mark.any_runner

MARK = "AOT_DEMO_TEST"
"""An environment variable that all processes of a demo inherit."""


@pytest.fixture
def arguments(tmp_path):
    clip = tmp_path / "clip.mp4"
    write_clip(clip, frames=40, height=120, width=160)
    return [f"--model={checkpoint('tiny')}", f"--video={clip}", "--retention=0.25"]


def start(arguments, tmp_path, program=("-m", "demo.run")):
    environment = {**os.environ, MARK: str(tmp_path), "COLUMNS": "120", "TMPDIR": str(tmp_path)}
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def still_running(tmp_path):
    """Processes of the demo that are left, by their environment."""
    left = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if f"{MARK}={tmp_path}".encode() in (entry / "environ").read_bytes():
                    left.append((entry / "cmdline").read_bytes())
            except OSError:  # ended meanwhile
                continue
    return left


def test_the_embedded_model_answers_whole_and_reduced(tmp_path):
    demo = start([], tmp_path, ("-c", "from demo import run; run.show_answers(retention=0.1)"))
    output, _ = demo.communicate(timeout=200)
    assert demo.returncode == 0, output
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if "?" in line]
    assert len(rows) == len(KINDS)
    whole_right = 0
    for _, truth, *said in rows:
        for answer in said:
            words, _, mark = answer.rpartition(" ")
            assert mark == ("✓" if words == truth else "✗")
        whole_right += said[0].endswith("✓")
    assert whole_right >= len(KINDS) - 1
    assert f"{whole_right} of {len(KINDS)} right with 577 video tokens" in output
    assert "with 59." in output
    assert still_running(tmp_path) == []


@pytest.mark.slow
def test_it_prints_what_a_question_costs_whole_and_reduced(arguments, tmp_path):
    demo = start(arguments, tmp_path)
    output, _ = demo.communicate(timeout=200)
    assert demo.returncode == 0, output
    rows = {}
    for line in output.splitlines():
        if len(cells := [cell.strip() for cell in line.split("│")]) == 5:
            rows[cells[1]] = cells[2:4]
    assert rows["video tokens before"] == ["289", "289"]
    assert rows["video tokens after"] == ["289", "73"]
    whole, reduced = (int(cell.replace(",", "")) for cell in rows["prompt tokens"])
    assert whole - reduced == 289 - 73
    assert all(float(cell.removesuffix(" s")) > 0 for cell in rows["time to first token"])
    assert all(rows["answer"])
    assert "75% of the video tokens" in output
    assert "random weights" not in output  # that is said of the demo's own model only
    assert still_running(tmp_path) == []


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_stops_all_it_started(arguments, tmp_path, sign):
    demo = start(arguments, tmp_path)
    deadline = time.monotonic() + 60
    while len(still_running(tmp_path)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    demo.send_signal(sign)
    output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130
    assert "Stopped." in output
    assert still_running(tmp_path) == []


def test_an_engine_that_does_not_start_is_reported_with_its_last_words(arguments, tmp_path):
    demo = start(["--model=/nowhere", *arguments[1:]], tmp_path)
    output, _ = demo.communicate(timeout=120)
    assert demo.returncode == 1
    assert "vLLM with the AOT plugin ended at once" in output
    assert "/nowhere" in output
    assert still_running(tmp_path) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--retention=1.5", "RETENTION must be in [0.01, 0.99] with at most two decimals, got 1.5"),
        ("--retention=tenth", "got tenth"),
        ("--video=/nowhere.mp4", "VIDEO must be a file, got /nowhere.mp4"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_starts(arguments, tmp_path, wrong, message):
    demo = start([*arguments, wrong], tmp_path)
    output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 2
    assert message in output
