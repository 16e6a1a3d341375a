"""What the containers of compose.yaml see, with all that is mounted there in a directory of a test."""

import os
import sys
from pathlib import Path

import yaml

from server.keys import digest_of
from tests.deploy.files import ROOT, composed, environment_of, last_stage

SERVICES = composed(AOT_MODEL="m")["services"]
KEY, ENGINE_KEY = "sk-aot-client", "sk-engine"
MOUNTS = {"/etc/aot": "config", "/run/secrets": "secrets", "/var/lib/aot/media": "media", "/var/lib/aot/files": "files"}


def prepare(directory: Path) -> None:
    """Make what is mounted: the example configuration with one key, the engine's key, empty volumes."""
    for name in MOUNTS.values():
        (directory / name).mkdir()
    example = yaml.safe_load((ROOT / "docker" / "gateway.example.yaml").read_text())
    example["tenants"]["example"]["keys"] = [{"sha256": digest_of(KEY.encode())}]
    (directory / "config" / "gateway.yaml").write_text(yaml.safe_dump(example))
    (directory / "secrets" / "engine_key").write_text(f"{ENGINE_KEY}\n")


def placed(text: str, directory: Path) -> str:
    """Return a setting or an argument as it is where the mounts are in a directory."""
    for target, name in MOUNTS.items():
        text = text.replace(target, str(directory / name))
    return text


def dockerfile(service: str) -> Path:
    """Return what the image of a service is built from."""
    return ROOT / SERVICES[service]["build"]["dockerfile"]


def environment(service: str, directory: Path) -> dict[str, str]:
    """Return all that a container has in its environment, but for this machine's programs and this user's caches."""
    given = {**environment_of(dockerfile(service)), **SERVICES[service]["environment"]}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    here = {"PATH": path, "PYTHONPATH": str(ROOT), "HOME": os.environ["HOME"]}
    return {name: placed(value, directory) for name, value in given.items()} | here


def entrypoint(service: str) -> str:
    """Return the image's entry point as its Dockerfile has it."""
    return last_stage(dockerfile(service))["ENTRYPOINT"]
