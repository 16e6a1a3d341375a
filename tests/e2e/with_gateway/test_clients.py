"""Clients as they are published, unpatched: a whole answer, a stream, usage, an error, and leaving amid a stream."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from demo.tiny_checkpoints import checkpoint
from tests.e2e.with_gateway.clients import environment
from tests.e2e.with_gateway.seen import BEFORE, after, counts, metric, wait_until
from tests.programs import needs

pytestmark = pytest.mark.any_runner

CLIENTS = Path(environment.__file__).parent
SAVED = {"before": BEFORE, "after": after(0.15), "retention": 0.15}


def python_2():
    return environment.python()


def python_with_openai_3():
    return environment.python_with_openai_3()


def python_3():
    return Path(sys.executable)


def node(packages=""):
    folder = environment.node_modules(packages)
    for script in CLIENTS.glob("*.mjs"):  # modules are looked for beside the script
        shutil.copy(script, folder)
    return folder


def node_with_ai_sdk_6():
    return node("ai_sdk_6")


@pytest.mark.timeout(900)  # the first test of a client installs it
@pytest.mark.parametrize(
    ("runtime", "script"),
    [
        pytest.param(python_2, "openai_sdk.py", id="openai-python 2", marks=pytest.mark.slow),
        pytest.param(python_3, "openai_sdk.py", id="openai-python 3"),
        pytest.param(python_2, "litellm_sdk.py", id="LiteLLM's SDK", marks=pytest.mark.slow),
        pytest.param(python_2, "langchain_chat.py", id="LangChain's ChatOpenAI", marks=pytest.mark.slow),
        pytest.param(node, "openai_node.mjs", id="openai-node", marks=needs("node", "npm")),
        pytest.param(node, "vercel_ai.mjs", id="Vercel's AI SDK 7", marks=needs("node", "npm")),
        pytest.param(
            node_with_ai_sdk_6,
            "vercel_ai_6.mjs",
            id="Vercel's AI SDK 6",
            marks=[pytest.mark.slow, needs("node", "npm")],
        ),
        pytest.param(python_2, "llama_index_like.py", id="LlamaIndex's OpenAILike", marks=pytest.mark.slow),
        pytest.param(python_with_openai_3, "pydantic_ai_agent.py", id="pydantic-ai's agent", marks=pytest.mark.slow),
    ],
)
def test_a_published_client_gets_answers_streams_usage_and_errors_and_may_leave(
    gateway, engine, clip_url, runtime, script
):
    where = runtime()
    command = ["node", str(where / script)] if script.endswith(".mjs") else [str(where), str(CLIENTS / script)]
    environ = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    finished = metric(engine, "vllm:request_success_total", finished_reason="length")
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
    ) as client:
        client.stdin.write(json.dumps({"base_url": f"{gateway}/v1", "clip_url": clip_url}) + "\n")
        client.stdin.flush()
        line = next((line for line in client.stdout if line.startswith("{")), None)  # LiteLLM prints of its own
        if line is None:
            pytest.fail(client.stderr.read()[-3000:])
        wait_until(lambda: metric(engine, "vllm:num_requests_running") == 0)  # while the client is still there
        client.communicate("\n", timeout=20)
    seen = json.loads(line)

    assert seen["text"]
    assert seen["streamed"] == seen["text"]
    assert seen["error"]["status"] == 400
    assert "aot.retention must be in [0.1, 0.5]" in seen["error"].get("message", "") or seen["error"]["code"] == (
        "invalid_retention"
    )
    if "video_tokens" in seen:
        assert counts(seen["video_tokens"]) == SAVED
    else:
        assert seen["prompt_tokens"] > after(0.15)
    assert metric(engine, "vllm:request_success_total", finished_reason="length") - finished == 2 + seen.get("more", 0)


@needs("curl")
def test_curl_streams_an_answer_and_its_usage(gateway, clip_url, tmp_path):
    content = [{"type": "video_url", "video_url": {"url": clip_url}}, {"type": "text", "text": "What happens?"}]
    request = {"model": "fast", "messages": [{"role": "user", "content": content}], "max_tokens": 4, "stream": True}
    body = tmp_path / "request.json"
    body.write_text(json.dumps({**request, "stream_options": {"include_usage": True}}))
    command = ["curl", "-sSN", "--max-time", "60", "-D", "-", "-H", "content-type: application/json"]
    done = subprocess.run(
        [*command, "--data", f"@{body}", f"{gateway}/v1/chat/completions"], capture_output=True, text=True, check=True
    )
    head, _, events = done.stdout.replace("\r\n", "\n").partition("\n\n")
    assert f"x-aot-video-tokens-after: {after(0.15)}" in head
    *chunks, last = [line.removeprefix("data: ") for line in events.splitlines() if line]
    assert last == "[DONE]"
    assert counts(json.loads(chunks[-1])["usage"]["video_tokens"]) == SAVED


def test_vllms_own_benchmark_runs_through_the_gateway(gateway, engine, tmp_path):
    """`vllm bench serve` with random videos, of which it sends the bytes."""
    command = [
        str(Path(sys.executable).with_name("vllm")),
        *("bench", "serve", "--backend", "openai-chat", "--endpoint", "/v1/chat/completions"),
        *("--base-url", gateway, "--model", "fast", "--tokenizer", str(checkpoint("tiny"))),
        *("--dataset-name", "random-mm", "--num-prompts", "3", "--random-input-len", "8", "--random-output-len", "4"),
        *("--random-mm-base-items-per-request", "1", "--random-mm-num-mm-items-range-ratio", "0"),
        *("--random-mm-limit-mm-per-prompt", '{"image": 0, "video": 1}'),
        *("--random-mm-bucket-config", "{(96, 96, 8): 1.0}", "--max-concurrency", "2", "--seed", "1"),
        *("--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"),
    ]
    counted = metric(gateway, "aot_gateway_video_tokens_total", model="fast", stage="before")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (3, 0)
    assert metric(gateway, "aot_gateway_video_tokens_total", model="fast", stage="before") > counted
