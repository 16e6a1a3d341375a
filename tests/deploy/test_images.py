"""The Dockerfiles, as far as they can be checked without building them."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.deploy.files import DOCKERFILES, ROOT, environment_of, health_command, instructions, last_stage

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
each_image = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)


@each_image
def test_hadolint_has_nothing_to_say(dockerfile):
    hadolint = Path(sys.executable).with_name("hadolint")
    found = subprocess.run([hadolint, "--no-color", dockerfile], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")


@each_image
def test_images_are_pinned_run_as_a_user_and_are_told_to_stop_directly(dockerfile):
    bases = [arguments.split()[0] for name, arguments in instructions(dockerfile) if name == "FROM"]
    assert all(re.search(r":v?\d+\.\d+", base) for base in bases)
    stage = last_stage(dockerfile)
    assert int(stage["USER"].split(":")[0]) > 0
    assert stage["STOPSIGNAL"] == "SIGTERM"
    assert isinstance(json.loads(stage["ENTRYPOINT"]), list)  # a shell in between would keep the signal to itself


@each_image
def test_labels_name_the_licence_of_the_project_and_leave_the_version_to_whoever_publishes(dockerfile):
    labels = dict(pair.split("=", 1) for pair in shlex.split(last_stage(dockerfile)["LABEL"]))
    assert "org.opencontainers.image.version" not in labels, "the version stands in pyproject.toml alone"
    assert labels["org.opencontainers.image.licenses"] == PROJECT["project"]["license"]


@each_image
def test_what_is_copied_is_there_and_let_in_by_dockerignore(dockerfile):
    let_in = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for name, arguments in instructions(dockerfile):
        if name != "COPY" or "--from=" in arguments:
            continue
        for source in [word for word in arguments.split() if not word.startswith("--")][:-1]:
            assert (ROOT / source).exists()
            assert any(Path(source).match(entry) or entry.startswith(f"{source}/") for entry in let_in), source


def test_the_engine_is_the_release_that_the_plugin_is_tested_with():
    (wanted,) = PROJECT["project"]["optional-dependencies"]["gpu"][:1]
    text = (ROOT / "docker" / "engine.Dockerfile").read_text()
    assert f"FROM vllm/vllm-openai:v{wanted.removeprefix('vllm==')}\n" in text


@pytest.mark.parametrize("image", ["engine", "engine-cpu"])
def test_an_engine_loads_the_plugin_and_asks_nobody_for_models(image):
    environment = environment_of(ROOT / "docker" / f"{image}.Dockerfile")
    assert environment["VLLM_PLUGINS"] == "aot"
    assert environment["HF_HUB_OFFLINE"] == "1"


@each_image
def test_the_health_check_fails_where_nobody_listens(dockerfile, unused_tcp_port):
    command = [part.replace("8000", str(unused_tcp_port)) for part in health_command(dockerfile)]
    environment = {"AOT_GATEWAY_PORT": str(unused_tcp_port)}
    failed = subprocess.run([sys.executable, *command[1:]], env=environment, capture_output=True, check=False)
    assert failed.returncode == 1
    assert b"ConnectionRefusedError" in failed.stderr


class TestServe:
    @pytest.fixture
    def serve(self, tmp_path):
        vllm = tmp_path / "vllm"
        vllm.write_text('#!/bin/sh\nprintf "%s|" "$$" "$VLLM_API_KEY" "$@"\n')
        vllm.chmod(0o755)
        return lambda *arguments, **environment: subprocess.Popen(
            [ROOT / "docker" / "serve.sh", *arguments],
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def test_it_becomes_vllm_with_the_key_in_the_environment_alone(self, serve, tmp_path):
        key = tmp_path / "key"
        key.write_text("sk-engine\n")
        started = serve("a model", "--flag", ENGINE_KEY_FILE=str(key))
        told, _ = started.communicate(timeout=10)
        assert told.split("|") == [str(started.pid), "sk-engine", "serve", "a model", "--flag", ""]

    def test_without_a_key_file_the_engine_wants_none(self, serve):
        told, _ = serve("a model").communicate(timeout=10)
        assert told.split("|")[1:] == ["", "serve", "a model", ""]

    @pytest.mark.parametrize("content", [None, "", "\n"])
    def test_a_key_file_without_a_key_stops_the_start(self, serve, tmp_path, content):
        key = tmp_path / "key"
        if content is not None:
            key.write_text(content)
        started = serve("a model", ENGINE_KEY_FILE=str(key))
        told, why = started.communicate(timeout=10)
        assert started.returncode != 0
        assert told == ""
        assert why
