"""Prometheus with the command and the files of compose.yaml, as a process."""

import re
import shlex
import subprocess
import time
from urllib.parse import urlsplit

import httpx
import pytest

from tests.deploy.files import ROOT, composed
from tests.deploy.rules import ALERTS, RECORDED
from tests.programs import needs

SERVICE = composed(AOT_MODEL="m")["services"]["prometheus"]

pytestmark = needs("prometheus", "promtool")


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory, unused_tcp_port_factory):
    """A client of one that runs, found by the address of the health check."""
    tmp_path, port = tmp_path_factory.mktemp("prometheus"), unused_tcp_port_factory()
    mounts = {volume["target"]: volume["source"] for volume in SERVICE["volumes"] if isinstance(volume, dict)}
    for target, source in mounts.items():
        place = tmp_path / target.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(ROOT / source)
    [data] = [volume.split(":")[1] for volume in SERVICE["volumes"] if isinstance(volume, str)]
    (tmp_path / data.lstrip("/")).mkdir()
    command = [argument.replace("=/", f"={tmp_path}/") for argument in SERVICE["command"]]
    here = f"--web.listen-address=127.0.0.1:{port}"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(["prometheus", *command, here], stdout=log, stderr=subprocess.STDOUT)
    health = urlsplit(SERVICE["healthcheck"]["test"][-1])
    assert (health.hostname, health.port) == ("127.0.0.1", 9090)  # its own default
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            wait_until(lambda: answers(client, health.path) or process.poll() is not None)
            assert process.poll() is None, (tmp_path / "log").read_text()
            yield client
    finally:
        process.terminate()
        process.wait(20)


def wait_until(true):
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def answers(client, path):
    try:
        return client.get(path).status_code == client.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False


def test_it_starts_with_every_rule_and_asks_gateway_and_engine(prometheus):
    groups = prometheus.get("/api/v1/rules").json()["data"]["groups"]
    assert {rule["name"] for group in groups for rule in group["rules"]} == ALERTS.keys() | RECORDED.keys()
    assert prometheus.get("/api/v1/status/runtimeinfo").json()["data"]["storageRetention"] == "15d"

    def targets():  # known some seconds after the start
        return {target["scrapeUrl"] for target in prometheus.get("/api/v1/targets").json()["data"]["activeTargets"]}

    wait_until(lambda: len(targets()) > 1)
    assert targets() == {"http://gateway:8080/metrics", "http://engine:8000/metrics"}


def test_it_answers_what_the_document_has_an_operator_ask(prometheus):
    document = (ROOT / "docs" / "operate.md").read_text()
    asked = re.findall(r"^\$ docker compose exec prometheus (promtool .*)$", document, re.MULTILINE)
    assert len(asked) == 2
    for command in asked:
        here = command.replace("http://127.0.0.1:9090", str(prometheus.base_url).rstrip("/"))
        answered = subprocess.run(shlex.split(here), capture_output=True, text=True, timeout=30, check=False)
        assert answered.returncode == 0, answered.stderr
