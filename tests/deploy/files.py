"""compose.yaml and the Dockerfiles as their tests read them."""

import json
import re
import shlex
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
COMPOSE = (ROOT / "compose.yaml").read_text()
VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?:(?P<kind>:-|:\?)(?P<rest>[^}]*))?\}")


def example_variables() -> dict[str, str]:
    """What .env.example sets."""
    lines = (ROOT / ".env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def composed(**variables: str):
    """compose.yaml as Docker Compose reads it with these variables; a KeyError names one that it wants."""

    def value(match: re.Match[str]) -> str:
        if match["kind"] == ":-":
            return variables.get(match["name"]) or match["rest"]
        return variables[match["name"]]

    return yaml.safe_load(VARIABLE.sub(value, COMPOSE))


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """The instructions with their arguments, continued lines joined."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in joined if line.strip()]


def last_stage(dockerfile: Path) -> dict[str, str]:
    """The arguments of the last stage's instructions, the last of each kind."""
    found = {}
    for name, arguments in instructions(dockerfile):
        found = {} if name == "FROM" else found
        found[name] = arguments
    return found


def environment_of(dockerfile: Path) -> dict[str, str]:
    """What the image sets in the environment."""
    return dict(pair.split("=", 1) for pair in shlex.split(last_stage(dockerfile)["ENV"]))


def health_command(dockerfile: Path) -> list[str]:
    """The command of the image's health check."""
    command: list[str] = json.loads(last_stage(dockerfile)["HEALTHCHECK"].partition("CMD")[2])
    return command
