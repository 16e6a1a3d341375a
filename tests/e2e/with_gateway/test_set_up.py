"""A real engine without flags that the gateway needs: the operator learns it, and no client is blamed."""

import json
import sys
from importlib import metadata

import httpx
import pytest

from demo.tiny_checkpoints import checkpoint
from tests.e2e.engines import free_port, process, serve_command
from tests.e2e.with_gateway.seen import metric

pytestmark = [pytest.mark.any_runner, pytest.mark.slow]


@pytest.fixture(scope="module")
def set_up(tmp_path_factory):
    """The address of a gateway in front of an engine without trust and details, and the path of its log."""
    folder, port, gateway_port = tmp_path_factory.mktemp("set-up"), free_port(), free_port()
    engine, gateway = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{gateway_port}"
    without = ("--no-trust-request-mm-kwargs", "--no-enable-prompt-tokens-details")
    serve = serve_command(checkpoint("tiny"), port, "--served-model-name=tiny", "--video-pruning-rate=0.75", *without)
    config = folder / "gateway.yaml"
    models = {"fast": {"engine_model": "tiny", "retention": 0.15}, "other": {"engine_model": "another"}}
    config.write_text(json.dumps({"models": models}))
    environment = {
        "AOT_GATEWAY_PORT": str(gateway_port),
        "AOT_GATEWAY_ENGINES": engine,
        "AOT_GATEWAY_CONFIG": str(config),
    }
    with (
        process(serve, health=f"{engine}/health", log=folder / "engine"),
        process(
            [sys.executable, "-m", "server"],
            health=f"{gateway}/health/ready",
            log=folder / "gateway",
            environment=environment,
        ),
    ):
        yield gateway, folder / "gateway"


def lines(log):
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_what_the_engine_lacks_is_told_at_the_start(set_up):
    gateway, log = set_up
    lacking = {"request_kwargs", "prompt_details"}
    (engine,) = httpx.get(f"{gateway}/health/ready").json()["engines"]
    assert set(engine["failed_checks"]) == lacking
    for check in ("key", "models", "plugin", "frames", "reduction", "limits", *lacking):
        assert metric(gateway, "aot_gateway_engine_check", engine="engine-0", check=check) == (check not in lacking)
    (examined,) = [line for line in lines(log) if line["event"] == "engine examined"]
    assert examined["versions"]["vllm"] == metadata.version("vllm").partition("+")[0]
    assert (examined["reduction"]["active"], examined["reduction"]["retention"]) == (True, 0.25)
    assert {line["check"] for line in lines(log) if "check" in line} == lacking
    (unserved,) = [line for line in lines(log) if "engine_models" in line]
    assert unserved["engine_models"] == ["another"]
    listed = httpx.get(f"{gateway}/v1/models").json()["data"]
    assert [(card["id"], card["aot"]["engine_retention"]) for card in listed] == [("fast", 0.25)]


def test_a_question_that_fails_for_a_flag_is_not_the_clients_fault(set_up, clip_url):
    gateway, log = set_up
    content = [{"type": "video_url", "video_url": {"url": clip_url}}, {"type": "text", "text": "What happens?"}]
    request = {"model": "fast", "messages": [{"role": "user", "content": content}], "max_tokens": 2}
    answer = httpx.post(f"{gateway}/v1/chat/completions", json=request, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_misconfigured")
    assert "mm_processor_kwargs" not in answer.text
    assert metric(gateway, "aot_gateway_rejections_total", reason="misconfigured") == 1
    (told,) = [line for line in lines(log) if "engine_message" in line]
    assert "--trust-request-mm-kwargs" in told["engine_message"]
