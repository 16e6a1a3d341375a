"""What docs/operate.md and the README tell an operator to type, typed."""

import asyncio
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from server import configuration
from server.keys import digest_of
from tests.deploy.files import ROOT, composed
from tests.deploy.rules import ALERTS
from tests.programs import needs
from tests.server.clips import clip
from tests.server.engine_double import EngineDouble
from tests.server.harness import GatewayProcess

OPERATE = (ROOT / "docs" / "operate.md").read_text()
README = (ROOT / "README.md").read_text()
SERVICES = composed(AOT_MODEL="m")["services"]
MANIFESTS = ROOT / "deploy" / "kubernetes" / "base"


def commands(text: str) -> list[str]:
    """The commands of a document's console blocks, each with its further lines."""
    blocks = re.findall(r"^( *)```console\n(.*?)\n *```", text, re.DOTALL | re.MULTILINE)
    return [command for _, block in blocks for command in re.split(r"^ *\$ ", block, flags=re.MULTILINE)[1:]]


def beginning(start: str, text: str = OPERATE) -> list[str]:
    found = [command for command in commands(text) if command.startswith(start)]
    assert found, start
    return found


def typed(command: str, where: Path, **environment: str) -> str:
    """What a shell prints, with this Python as everybody's."""
    done = subprocess.run(
        ["sh", "-c", re.sub(r"^python3? ", f"{shlex.quote(sys.executable)} ", command)],
        cwd=where,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


@pytest.fixture
async def gateway(tmp_path):
    """The address of one with the models of the document's example."""
    [example] = re.findall(r"```yaml\n(models:.*?)```", OPERATE, re.DOTALL)
    (tmp_path / "gateway.yaml").write_text(example)
    async with EngineDouble(models=["video"], delay_seconds=0.2).serving() as engine:
        settings = {"CONFIG": str(tmp_path / "gateway.yaml")}
        async with GatewayProcess(engine.url, **settings) as running:
            yield running.url.removeprefix("http://")


@needs("curl")
async def test_a_first_question_is_answered_with_what_was_saved(gateway, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(clip())
    told = [
        await asyncio.to_thread(typed, command.replace("127.0.0.1:8080", gateway), tmp_path, AOT_API_KEY="any")
        for command in commands(OPERATE)
        if command.startswith(("curl", "printf"))
    ]
    assert len(told) == 4
    assert {model["id"] for model in json.loads(told[1])["data"]} == {"video", "video-full"}
    assert json.loads(told[3])["usage"]["video_tokens"] == {"before": 6272, "after": 627, "retention": 0.1}


async def test_retentions_are_compared_under_load(gateway, tmp_path):
    [command] = beginning("python -m locust")
    command = command.replace("127.0.0.1:8080", gateway).replace("run-time 10m", "run-time 3s").replace("loadtest/", "")
    small = " --sizes 64x48 --frames 8 --clips 1 --max-tokens 4"
    (tmp_path / "locustfile.py").symlink_to(ROOT / "loadtest" / "locustfile.py")
    await asyncio.to_thread(typed, command + small, tmp_path)
    rows = (tmp_path / "retention_stats.csv").read_text()
    assert all(f"TTFT,{arm}," in rows for arm in ("whole", "half", "quarter", "tenth"))


def test_the_secrets_are_made_as_the_readme_makes_them(tmp_path):
    (tmp_path / "docker").mkdir()
    for name in (".env.example", "docker/gateway.example.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    section = README.split("## With containers")[1]
    before = [command for command in commands(section) if not command.startswith("docker")]
    told = {command.split("#")[0].strip(): typed(command, tmp_path, PYTHONPATH=str(ROOT)) for command in before}
    key, digest = re.search(r"key: +(\S+)\nsha256: (\S+)", told["python3 -m server.keys"]).groups()
    assert digest == digest_of(key.encode())
    given = {path.name: path for path in (tmp_path / "secrets").iterdir()}
    assert set(given) == {"engine_key", "grafana_password"}
    assert {path.stat().st_mode & 0o777 for path in given.values()} == {0o644}
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700
    assert len(given["engine_key"].read_text()) == 65
    config = tmp_path / "config" / "gateway.yaml"
    assert (config.stat().st_mode & 0o777, config.parent.stat().st_mode & 0o777) == (0o644, 0o755)
    config.write_text(config.read_text().replace("0" * 64, digest))
    assert configuration.load(config).tenants
    assert (tmp_path / ".env").read_text() == (ROOT / ".env.example").read_text()


def test_links_to_runbooks_get_an_address_everywhere(tmp_path):
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    [sed] = beginning("sed")
    [generate] = beginning("python3 -m deploy")
    for command in (sed, sed, generate):  # twice changes nothing
        typed(command, tmp_path)
    rules = tmp_path / "deploy" / "prometheus" / "rules" / "alerts.yml"
    manifest = tmp_path / "deploy" / "kubernetes" / "components" / "monitoring" / "rules.yaml"
    on_a_host = [rule for group in yaml.safe_load(rules.read_text())["groups"] for rule in group["rules"]]
    on_kubernetes = [
        rule
        for group in yaml.safe_load(manifest.read_text())["spec"]["groups"]
        for rule in group["rules"]
        if "alert" in rule
    ]
    assert len(on_a_host) == len(ALERTS) == len(on_kubernetes) + 1
    for rule in on_a_host + on_kubernetes:
        anchor = f"docs/operate.md#{rule['alert'].lower()}"
        assert rule["annotations"]["runbook_url"] == f"https://git.example.com/aot-vllm/blob/main/{anchor}"


def test_services_and_workloads_that_commands_name_are_there():
    for command in beginning("docker compose"):
        verb, *rest = shlex.split(command)[2:]
        verbs = {"up", "ps", "logs", "build", "exec", "restart"}
        assert verb in verbs, command
        words = rest[:1] if verb == "exec" else [word for word in rest if not word.startswith("-") and word != "15m"]
        assert set(words) <= SERVICES.keys(), command
    manifests = [d for path in MANIFESTS.glob("*.yaml") for d in yaml.safe_load_all(path.read_text())]
    there = {f"{d['kind']}/{d['metadata']['name']}".lower() for d in manifests if "metadata" in d}
    for command in beginning("kubectl"):
        assert {word for word in command.split() if re.fullmatch(r"[a-z]+/[a-z]+", word)} <= there, command
