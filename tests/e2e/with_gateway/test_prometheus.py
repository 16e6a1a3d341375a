"""A real Prometheus looks at a real engine and gateway: every rule and every panel finds what it asks for."""

import base64
import math
import time

import httpx
import openai
import pytest
import yaml

from demo.clip import write_clip
from tests.deploy.dashboards import queries
from tests.deploy.rules import ALERTS, PROMETHEUS, RECORDED, RULE_FILES, metrics_in
from tests.e2e.engines import free_port, process
from tests.programs import needs

pytestmark = [pytest.mark.any_runner, needs("prometheus")]

VARIABLES = {
    "$__rate_interval": "30s",
    "$__range": "1m",
    "$model": ".*",
    "$engine": ".*",
    "$price": "2.00",
}
MAY_FIRE = {"AOTFirstTokenBurnFast", "AOTFirstTokenBurnSlow", "AOTQueueWait", "AOTKVCachePressure"}
"""They depend on how fast this machine is."""


def ask(gateway, folder, *, number):
    """Ask about a video nobody has seen, as a stream and whole, and about text, and for a model that isn't there."""
    clip = folder / f"{number}.mp4"
    write_clip(clip, frames=41 + number, height=120, width=160)
    url = "data:video/mp4;base64," + base64.b64encode(clip.read_bytes()).decode()
    video = {"type": "video_url", "video_url": {"url": url}}
    content = [video, {"type": "text", "text": "What happens?"}]
    with openai.OpenAI(base_url=f"{gateway}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        fields = {"messages": [{"role": "user", "content": content}], "max_tokens": 4}
        for model in ("fast", "whole", "engine-default"):
            client.chat.completions.create(model=model, **fields)
            with client.chat.completions.create(model=model, stream=True, **fields) as stream:
                assert list(stream)
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="none such", **fields)


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory, engine, gateway):
    """Prometheus with the configuration as it is deployed, but for addresses and intervals, after some traffic."""
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(path) for path in RULE_FILES]
    addresses = {"gateway:8080": gateway, "engine:8000": engine}
    for job in config["scrape_configs"]:
        for group in job["static_configs"]:
            group["targets"] = [addresses[target].removeprefix("http://") for target in group["targets"]]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    command = [
        "prometheus",
        f"--config.file={path}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    address = f"http://127.0.0.1:{port}"
    with process(command, health=f"{address}/-/ready", log=folder / "log"), httpx.Client(base_url=address) as client:
        assert (
            without_data(client, {"first scrapes": "sum(up) == 2"}) == {}
        )  # which begin some seconds after it is ready
        for number in range(3):  # a rate needs a counter to grow between two scrapes
            ask(gateway, folder, number=number)
            time.sleep(2)
        yield client


def evaluated(prometheus, expression):
    """Return the values of a PromQL expression that are numbers."""
    answer = prometheus.get("/api/v1/query", params={"query": expression}).json()
    assert answer["status"] == "success", (expression, answer)
    values = [float(result["value"][1]) for result in answer["data"]["result"]]
    return [value for value in values if math.isfinite(value)]


def without_data(prometheus, expressions, *, seconds=20):
    """Return which of the expressions still find nothing after a while, by name."""
    deadline = time.monotonic() + seconds
    while True:
        expressions = {name: it for name, it in expressions.items() if not evaluated(prometheus, it)}
        if not expressions or time.monotonic() > deadline:
            return expressions
        time.sleep(1)


def test_every_panel_shows_something(prometheus):
    expressions = queries()
    for variable, value in VARIABLES.items():
        expressions = {name: expression.replace(variable, value) for name, expression in expressions.items()}
    assert without_data(prometheus, expressions) == {}


def test_every_recording_rule_records(prometheus):
    assert without_data(prometheus, {name: name for name in RECORDED}) == {}
    rules = prometheus.get("/api/v1/rules").json()["data"]["groups"]
    assert {rule["health"] for group in rules for rule in group["rules"]} == {"ok"}


def test_alerts_ask_about_what_is_there_and_are_silent_while_all_is_well(prometheus):
    for name, alert in ALERTS.items():
        assert without_data(prometheus, {metric: metric for metric in metrics_in(alert["expr"])}) == {}, name
        if name not in MAY_FIRE:
            assert evaluated(prometheus, alert["expr"]) == [], name
