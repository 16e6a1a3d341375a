"""docs/loadtest.md says what the load test takes, and what vLLM's takes."""

import re
import shlex
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


def test_vllm_takes_the_command_for_the_open_loop():
    from vllm.benchmarks.serve import add_cli_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    command = re.search(r"\$ vllm bench serve (.*?)```", TEXT, re.DOTALL)[1].replace("\\\n", " ")
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    parsed = parser.parse_args(shlex.split(command))
    assert parsed.request_rate == 0.5
    assert parsed.extra_body == {"aot": {"retention": 0.1}}
    assert parsed.random_mm_bucket_config == {(256, 256, 16): 1.0}
