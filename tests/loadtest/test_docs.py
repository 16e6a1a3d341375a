"""docs/loadtest.md says what the load test takes."""

import re
import subprocess
import sys

from tests.server.harness import ROOT

TEXT = (ROOT / "docs" / "loadtest.md").read_text()


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text))


def test_the_table_of_options_is_that_of_the_locustfile_and_the_commands_use_no_others():
    command = [sys.executable, "-m", "locust", "--help"]
    locusts = options_in(subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout)
    ours = set(re.findall(r'add_argument\(\s*"(--[a-z0-9-]+)"', (ROOT / "loadtest" / "locustfile.py").read_text()))
    assert {row.split("`")[1] for row in TEXT.splitlines() if row.startswith("| `--")} == ours
    assert options_in(TEXT.split("$ vllm bench")[0]) <= locusts | ours
