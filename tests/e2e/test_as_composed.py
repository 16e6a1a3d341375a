"""compose.yaml's profile for CPUs as plain processes: its commands and environments, but for a tiny checkpoint."""

import signal
import subprocess
import sys

import httpx
import pytest

from demo.tiny_checkpoints import checkpoint
from tests.conftest import is_built_for_cpu
from tests.deploy.containers import ENGINE_KEY, KEY, SERVICES, dockerfile, entrypoint, environment, placed, prepare
from tests.deploy.files import ROOT, health_command
from tests.e2e.engines import free_port, process
from tests.e2e.with_gateway.seen import BEFORE, after, metric
from tests.server.clips import clip, data_url

pytestmark = [
    pytest.mark.any_runner,
    pytest.mark.slow,
    pytest.mark.skipif(not is_built_for_cpu(), reason="the profile for CPUs, with another vLLM than that for CPUs"),
]


def alone_in(environment_of_container, *command):
    """Return the command with this environment and nothing of the test's."""
    return ["env", "-i", *(f"{name}={value}" for name, value in environment_of_container.items()), *command]


def engine_command(directory, port):
    assert entrypoint("engine-cpu") == '["serve"]'
    model, *flags = (placed(argument, directory) for argument in SERVICES["engine-cpu"]["command"])
    assert model == "/models/demo"
    serve = [ROOT / "docker" / "serve.sh", checkpoint("tiny"), *flags, "--host=127.0.0.1", f"--port={port}"]
    return alone_in(environment("engine-cpu", directory), *serve)


def gateway_command(directory, port, engine):
    places = {"AOT_GATEWAY_HOST": "127.0.0.1", "AOT_GATEWAY_PORT": port, "AOT_GATEWAY_ENGINES": engine}
    return alone_in({**environment("gateway", directory), **places}, sys.executable, "-m", "server")


def ask(gateway, engine):
    """Ask for both models of the example configuration."""
    chat = f"{gateway}/v1/chat/completions"
    video = {"type": "video_url", "video_url": {"url": data_url(clip(frames=40))}}
    content = [video, {"type": "text", "text": "What happens?"}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 2}
    assert httpx.post(chat, json={"model": "video", **body}).status_code == 401
    for model, left in (("video", after(0.1)), ("video-full", BEFORE)):
        key = {"authorization": f"Bearer {KEY}"}
        answer = httpx.post(chat, json={"model": model, **body}, headers=key, timeout=60)
        assert answer.status_code == 200, answer.text
        tokens = answer.json()["usage"]["video_tokens"]
        assert (tokens["before"], tokens["after"]) == (BEFORE, left)
    assert metric(engine, "aot_engine_reductions_total") == 1


def test_engine_and_gateway_answer_with_the_commands_and_environments_of_compose(tmp_path):
    prepare(tmp_path)
    ports = free_port(), free_port()
    engine, gateway = (f"http://127.0.0.1:{port}" for port in ports)
    started = process(engine_command(tmp_path, ports[0]), health=f"{engine}/health", log=tmp_path / "engine.log")
    with started as engine_process:
        healthy = [part.replace("8000", str(ports[0])) for part in health_command(dockerfile("engine-cpu"))]
        assert subprocess.run([sys.executable, *healthy[1:]], check=False).returncode == 0
        assert httpx.get(f"{engine}/v1/models").status_code == 401
        assert httpx.get(f"{engine}/v1/models", headers={"authorization": f"Bearer {ENGINE_KEY}"}).status_code == 200

        command = gateway_command(tmp_path, ports[1], engine)
        with process(command, health=f"{gateway}/health/ready", log=tmp_path / "gateway.log"):
            ask(gateway, engine)
        assert list((tmp_path / "media").iterdir()), "the engine read the video where the gateway had put it"

        engine_process.send_signal(signal.SIGTERM)
        grace = int(SERVICES["engine-cpu"]["stop_grace_period"].removesuffix("s"))
        assert engine_process.wait(grace) == 0
