"""The README's "Serve it" on a machine without a GPU: engine and gateway as it starts them, and its question."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from demo.h264 import write_h264
from demo.task import questions, render, scene
from tests.conftest import is_built_for_cpu
from tests.docs.blocks import ROOT, on
from tests.e2e.engines import free_port, process
from tests.server.clips import data_url

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.any_runner,
    pytest.mark.slow,
    pytest.mark.skipif(not is_built_for_cpu(), reason="the README's engine for CPUs, with another vLLM than that"),
]


def command_with(part: str) -> str:
    """The command of the README that has this part."""
    found = [command for block in on("README.md", "console") for command in block.commands if part in command]
    assert len(found) == 1, found
    return found[0]


def as_typed(command: str, **environment: str) -> list[str]:
    """What a shell in the checkout is asked, in a fresh environment."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = {"PATH": path, "HOME": os.environ["HOME"], **environment}
    given = [f"{name}={value}" for name, value in variables.items()]
    return ["env", "-i", "-C", str(ROOT), *given, "bash", "-c", f"exec env {command}"]


def asked(gateway: str, url: str, question: str) -> tuple[str, dict[str, float]]:
    """The answer and its counts, by the README's example."""
    [block] = on("README.md", "python")
    code = block.text.replace("http://127.0.0.1:8080", gateway).replace("data:video/mp4;base64,…", url)
    code = re.sub(r'model=".*?"', 'model="demo/model", temperature=0', code).replace(
        "What happens in the video?", question
    )
    code += "\nprint([answer.choices[0].message.content, answer.usage.video_tokens])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    answer, counts = ast.literal_eval(done.stdout)
    return answer.strip(), counts


def test_the_engine_for_a_cpu_and_the_gateway_answer_as_the_readme_starts_them(tmp_path):
    ports = free_port(), free_port()
    engine, gateway = (f"http://127.0.0.1:{port}" for port in ports)
    serve = as_typed(f"{command_with('vllm serve demo/model')} --port {ports[0]}")
    start = command_with("python -m server").replace("http://127.0.0.1:8000", engine)
    made = scene(0, split="test")
    write_h264(tmp_path / "clip.mp4", render(made)[0])
    url = data_url((tmp_path / "clip.mp4").read_bytes(), "video/mp4")
    with (
        process(serve, health=f"{engine}/health", log=tmp_path / "engine.log", timeout_seconds=540),
        process(
            as_typed(start, AOT_GATEWAY_PORT=str(ports[1])),
            health=f"{gateway}/health/ready",
            log=tmp_path / "gateway.log",
        ),
    ):
        checks = httpx.get(f"{gateway}/health/ready").json()
        assert "AOT is active" in (tmp_path / "engine.log").read_text()
        about = [question for question in questions(made) if question.kind in ("what", "where", "direction")]
        answers = [asked(gateway, url, question.text) for question in about]
    assert checks["status"] == "ready"
    right = [answer == question.answer for (answer, _), question in zip(answers, about, strict=True)]
    assert sum(right) > len(about) / 2
    for _, counts in answers:
        assert counts["before"] == 16 * 36 + 1
        assert counts["after"] == round(0.15 * 16 * 36) + 1
