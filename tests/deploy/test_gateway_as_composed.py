"""The gateway with the command of its image and the environment of compose.yaml, as a process in front of a double."""

import subprocess
import sys

import httpx
import yaml

from server.keys import digest_of
from tests.deploy.files import ROOT, composed, environment_of, health_command, last_stage
from tests.server.clips import clip, data_url
from tests.server.engine_double import EngineDouble
from tests.server.harness import CHAT, GatewayProcess, ask_about

DOCKERFILE = ROOT / "docker" / "gateway.Dockerfile"
KEY, ENGINE_KEY = "sk-aot-client", "sk-engine"


def environment_in(directory):
    """The container's environment, with what is mounted there in `directory`."""
    for name in ("media", "files", "secrets"):
        (directory / name).mkdir()
    example = yaml.safe_load((ROOT / "docker" / "gateway.example.yaml").read_text())
    example["tenants"]["example"]["keys"] = [{"sha256": digest_of(KEY.encode())}]
    (directory / "secrets" / "gateway.yaml").write_text(yaml.safe_dump(example))
    (directory / "secrets" / "engine_key").write_text(f"{ENGINE_KEY}\n")
    image = environment_of(DOCKERFILE)
    image.pop("PATH")
    given = {**image, **composed(AOT_MODEL="m")["services"]["gateway"]["environment"]}
    mounts = {"/run/secrets": "secrets", "/var/lib/aot/media": "media", "/var/lib/aot/files": "files"}
    for target, name in mounts.items():
        given = {key: value.replace(target, str(directory / name)) for key, value in given.items()}
    return given


def healthy(port: int) -> bool:
    command = [sys.executable, *health_command(DOCKERFILE)[1:]]
    return subprocess.run(command, env={"AOT_GATEWAY_PORT": str(port)}, check=False).returncode == 0


async def test_it_answers_hands_the_video_over_as_a_file_and_ends_when_told(tmp_path):
    assert last_stage(DOCKERFILE)["ENTRYPOINT"] == '["python", "-m", "server"]'
    environment = environment_in(tmp_path)
    async with EngineDouble(models=["video"]).serving() as engine:
        places = {"AOT_GATEWAY_HOST": "127.0.0.1", "AOT_GATEWAY_PORT": "{port}", "AOT_GATEWAY_ENGINES": engine.url}
        async with GatewayProcess(engine.url, environment={**environment, **places}) as gateway:
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
