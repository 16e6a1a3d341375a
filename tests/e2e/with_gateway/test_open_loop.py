"""vLLM's own benchmark sends videos through the gateway with the command of docs/loadtest.md."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from demo.tiny_checkpoints import ROOT, checkpoint
from tests.e2e.with_gateway.seen import metric

pytestmark = [pytest.mark.any_runner, pytest.mark.slow]

FRAMES = 16


def command(gateway):
    text = (ROOT / "docs" / "loadtest.md").read_text()
    [documented] = re.findall(r"\$ vllm (bench serve (?:.*\\\n)*.*)", text)
    here = {
        "http://127.0.0.1:8080": gateway,
        "--model llava ": "--model fast ",
        "llava-hf/llava-onevision-qwen2-7b-ov-hf": str(checkpoint("tiny")),
        "--request-rate 0.5 --num-prompts 100": "--request-rate 2 --num-prompts 2",
        "\\\n": " ",
    }
    for there, ours in here.items():
        assert there in documented
        documented = documented.replace(there, ours)
    return [str(Path(sys.executable).with_name("vllm")), *shlex.split(documented)]


def test_its_requests_are_answered_reduced(gateway):
    def tokens():
        stages = ("before", "after")
        return [metric(gateway, "aot_gateway_video_tokens_total", stage=stage, model="fast") for stage in stages]

    known = tokens()
    ran = subprocess.run(command(gateway), capture_output=True, text=True, timeout=200, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    told = dict(re.findall(r"^(.+?):\s+([\d.]+) *$", ran.stdout, re.MULTILINE))
    assert (told["Successful requests"], told["Failed requests"]) == ("2", "0")
    assert float(told["Request rate configured (RPS)"]) == 2
    assert float(told["P95 TTFT (ms)"]) > 0
    # at retention 0.10 no frame would keep more than the one token that each keeps at least
    assert [now - then for now, then in zip(tokens(), known, strict=True)] == [2 * (FRAMES * 9 + 1), 2 * (FRAMES + 1)]
