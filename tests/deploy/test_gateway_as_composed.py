"""The gateway with the command of its image and the environment of compose.yaml, as a process in front of a double."""

import subprocess
import sys

import httpx

from tests.deploy.containers import ENGINE_KEY, KEY, dockerfile, entrypoint, environment, prepare
from tests.deploy.files import health_command
from tests.server.clips import clip, data_url
from tests.server.engine_double import EngineDouble
from tests.server.harness import CHAT, GatewayProcess, ask_about


def healthy(port: int) -> bool:
    command = [sys.executable, *health_command(dockerfile("gateway"))[1:]]
    return subprocess.run(command, env={"AOT_GATEWAY_PORT": str(port)}, check=False).returncode == 0


async def test_it_answers_hands_the_video_over_as_a_file_and_ends_when_told(tmp_path):
    assert entrypoint("gateway") == '["python", "-m", "server"]'
    prepare(tmp_path)
    async with EngineDouble(models=["video"]).serving() as engine:
        places = {"AOT_GATEWAY_HOST": "127.0.0.1", "AOT_GATEWAY_PORT": "{port}", "AOT_GATEWAY_ENGINES": engine.url}
        seen = {**environment("gateway", tmp_path), **places}
        async with GatewayProcess(engine.url, environment=seen) as gateway:
            async with httpx.AsyncClient(base_url=gateway.url, timeout=20) as client:
                assert healthy(gateway.port)
                assert (await client.get("/v1/models")).status_code == 401
                client.headers["authorization"] = f"Bearer {KEY}"
                answer = await client.post(CHAT, json=ask_about(data_url(clip()), model="video"))
                assert answer.status_code == 200
                assert answer.json()["usage"]["video_tokens"]["after"] == 627
                uploaded = await client.post("/v1/files", data={"purpose": "video"}, files={"file": clip()})
                assert uploaded.status_code == 200
            gateway.drain()
            code, _ = await gateway.ended()
            assert code == 0
    url = engine.requests[0]["messages"][0]["content"][0]["video_url"]["url"]
    assert url.startswith(f"file://{tmp_path}/media/")
    assert engine.request_headers[0]["authorization"] == f"Bearer {ENGINE_KEY}"
    assert list((tmp_path / "media").iterdir())
