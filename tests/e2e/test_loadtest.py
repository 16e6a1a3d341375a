"""`make loadtest` as its target calls it, on a tiny checkpoint: its table, its reports and its exit code."""

import os
import re
import subprocess
import sys

import pytest

from demo.tiny_checkpoints import ROOT, checkpoint

pytestmark = [pytest.mark.any_runner, pytest.mark.slow]


def test_it_prints_what_users_get_whole_and_reduced(tmp_path):
    [command] = re.findall(r"^\t@\$\(VENV\)/python (loadtest/run\.py) ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    arguments = [f"--model={checkpoint('tiny')}", "--retention=0.25", "--users=2", "--seconds=3"]
    ran = subprocess.run(
        [sys.executable, ROOT / command, *arguments],
        env={**os.environ, "COLUMNS": "120", "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout
    rows = {}
    for line in ran.stdout.splitlines():
        if len(cells := [cell.strip() for cell in line.split("│")]) == 5:
            rows[cells[1]] = cells[2:4]
    assert rows["requests failed"] == ["0", "0"]
    assert all(int(cell.replace(",", "")) >= 2 for cell in rows["requests answered"])
    assert rows["video tokens a request, before"] == ["289", "289"]
    assert rows["video tokens a request, after"] == ["289", "73"]
    for waited in ("time to first token, p95", "between tokens, median", "to the end, median"):
        assert all(float(cell.removesuffix(" ms").replace(",", "")) > 0 for cell in rows[waited])
    results = ROOT / ".cache" / "loadtest" / "results"
    assert {"off.html", "aot.html", "off_stats.csv", "aot_stats.csv"} <= {path.name for path in results.iterdir()}
