"""One engine and one gateway in front of it, real processes both, for all tests of the way through."""

import base64
import json
import sys

import pytest

from demo.clip import write_clip
from demo.tiny_checkpoints import checkpoint
from tests.e2e.engines import free_port, process, serve_command

SECRET = "known to both gateways"


@pytest.fixture(scope="package")
def clip_url(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_clip(path, frames=40, height=120, width=160)
    return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()


@pytest.fixture(scope="package")
def store(tmp_path_factory):
    """The directory that one gateway writes videos to and the engine reads from."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="package")
def engine(tmp_path_factory, store):
    """The address of an engine at rate 0.75, whose name for the model is `tiny`."""
    port = free_port()
    arguments = ("--video-pruning-rate=0.75", "--served-model-name=tiny", f"--allowed-local-media-path={store}")
    serve = serve_command(checkpoint("tiny"), port, *arguments)
    address, log = f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("engine") / "log"
    with process(serve, health=f"{address}/health", log=log):
        yield address


@pytest.fixture(scope="package")
def gateway(tmp_path_factory, engine):
    """The gateway's address, in front of that engine."""
    folder, port = tmp_path_factory.mktemp("gateway"), free_port()
    config = folder / "gateway.yaml"
    models = {
        "whole": {"engine_model": "tiny", "retention": 1.0},
        "fast": {"engine_model": "tiny", "retention": 0.15, "min_retention": 0.1, "max_retention": 0.5},
        "engine-default": {"engine_model": "tiny"},
    }
    config.write_text(json.dumps({"models": models}))
    files = folder / "files"
    files.mkdir()
    environment = {
        "AOT_GATEWAY_FILES_DIR": str(files),
        "AOT_GATEWAY_PORT": str(port),
        "AOT_GATEWAY_ENGINES": engine,
        "AOT_GATEWAY_CONFIG": str(config),
        "AOT_GATEWAY_MEDIA_SECRET": SECRET,
    }
    command, address = [sys.executable, "-m", "server"], f"http://127.0.0.1:{port}"
    with process(command, health=f"{address}/health/ready", log=folder / "log", environment=environment):
        yield address


@pytest.fixture(scope="package")
def gateway_with_store(tmp_path_factory, engine, store):
    """The address of another gateway in front of that engine, which hands videos over as files."""
    port = free_port()
    environment = {
        "AOT_GATEWAY_PORT": str(port),
        "AOT_GATEWAY_ENGINES": engine,
        "AOT_GATEWAY_MEDIA_HANDOFF": "file",
        "AOT_GATEWAY_MEDIA_DIR": str(store),
        "AOT_GATEWAY_MEDIA_SECRET": SECRET,
    }
    command, address = [sys.executable, "-m", "server"], f"http://127.0.0.1:{port}"
    log = tmp_path_factory.mktemp("gateway-with-store") / "log"
    with process(command, health=f"{address}/health/ready", log=log, environment=environment):
        yield address
