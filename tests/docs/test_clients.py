"""docs/clients.md: every example runs as it is written, and the engine receives the video."""

import asyncio
import base64
import functools
import http.server
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from server.settings import Settings
from tests.docs.blocks import on
from tests.e2e.with_gateway.clients import environment
from tests.programs import needs, require
from tests.server.clips import longer_than_an_argument
from tests.server.engine_double import COMPLETION
from tests.server.harness import served

pytestmark = pytest.mark.timeout(900)  # the first test of a client installs it

PAGE = "docs/clients.md"
TEXT = (Path(__file__).resolve().parents[2] / PAGE).read_text(encoding="utf-8")
CLIENTS = Path(environment.__file__).parent
KEY = "any text"
VIDEO = longer_than_an_argument()


def this_python() -> list[str]:
    return [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c"]


def python_with_openai_2() -> list[str]:
    return [str(environment.python()), "-c"]


def python_with_openai_3() -> list[str]:
    return [str(environment.python_with_openai_3()), "-c"]


def node(folder: str = "") -> list[str]:
    require("node", "npm")
    return ["node", str(environment.node_modules(folder) / "node_modules")]


def node_with_ai_sdk_6() -> list[str]:
    return node("ai_sdk_6")


slow, curl = pytest.mark.slow, needs("curl")
EXAMPLES = [
    pytest.param("curl", ["bash", "-euo", "pipefail", "-c"], 2, id="curl", marks=curl),
    pytest.param("httpx", this_python, 1, id="httpx"),
    pytest.param("openai for Python", this_python, 5, id="openai-python 3"),
    pytest.param("openai for Python", python_with_openai_2, 5, id="openai-python 2", marks=slow),
    pytest.param("openai for Node", node, 3, id="openai-node", marks=slow),
    pytest.param("AI SDK 7", node, 3, id="AI SDK 7", marks=slow),
    pytest.param("AI SDK 6", node_with_ai_sdk_6, 3, id="AI SDK 6", marks=slow),
    pytest.param("LangChain", python_with_openai_2, 3, id="LangChain", marks=slow),
    pytest.param("LiteLLM", python_with_openai_2, 3, id="LiteLLM", marks=slow),
    pytest.param("pydantic-ai", python_with_openai_3, 3, id="pydantic-ai", marks=slow),
    pytest.param("LlamaIndex", python_with_openai_2, 1, id="LlamaIndex", marks=slow),
    pytest.param("instructor", python_with_openai_2, 1, id="instructor", marks=slow),
]


@pytest.fixture
def media_host(tmp_path):
    """The address of a web server that has the clip."""
    (tmp_path / "clip.mp4").write_bytes(VIDEO)
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
async def run(engine, media_host, tmp_path):
    """Runs code as the page has it, against a gateway; returns what it prints."""
    engine.models = ["llava-hf/llava-onevision-qwen2-7b-ov-hf"]
    config, files = tmp_path / "gateway.yaml", tmp_path / "files"
    config.write_text("models: {llava-fast: {engine_model: llava-hf/llava-onevision-qwen2-7b-ov-hf}}")
    files.mkdir()
    settings = Settings(
        engines=(engine.url,), config=config, files_dir=files, media_allow_hosts=media_host, media_allow_http=True
    )
    async with served(settings) as url:

        async def run(command: list[str], code: str) -> str:
            code = code.replace("http://127.0.0.1:8080", url).replace(
                "https://media.example.com", f"http://{media_host}"
            )
            if command[0] == "node":  # a module finds packages beside it
                (tmp_path / "node_modules").symlink_to(command.pop())
                (tmp_path / "example.mjs").write_text(code)
                code = "example.mjs"
            ended = await asyncio.to_thread(
                subprocess.run,
                [*command, code],
                cwd=tmp_path,
                env={
                    "PATH": os.environ["PATH"],
                    "HOME": str(tmp_path),
                    "AOT_API_KEY": KEY,
                    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
                },
                capture_output=True,
                text=True,
                timeout=200,
            )
            assert ended.returncode == 0, ended.stderr[-3000:] + ended.stdout
            return ended.stdout

        yield run


def code_under(heading: str) -> str:
    """The code of a section, behind the lines that all examples of its language begin with."""
    if heading == "curl":
        commands = [command for block in on(PAGE, "console", heading) for command in block.commands]
        return "\n".join(re.sub(r"\bcurl ", "curl -sS --fail-with-body ", command) + "\necho" for command in commands)
    language = "python" if on(PAGE, "python", heading) else "javascript"
    return "\n".join(block.text for block in (*on(PAGE, language, "Clients"), *on(PAGE, language, heading)))


def answering_as(text: str) -> bytes:
    message = {**COMPLETION["choices"][0]["message"], "content": text}
    choice = {**COMPLETION["choices"][0], "message": message, "logprobs": None}
    return json.dumps({**COMPLETION, "choices": [choice]}).encode()


def video_in(request: dict) -> bytes:
    """The only video of a request that the engine got."""
    parts = [part for message in request.get("messages", request.get("input")) for part in message["content"]]
    [video] = [part["video_url"] for part in parts if "video_url" in part]
    url = video if isinstance(video, str) else video["url"]
    assert url.startswith("data:video/mp4;base64,")
    return base64.b64decode(url.partition(",")[2])


@pytest.mark.parametrize(("heading", "command", "asked"), EXAMPLES)
async def test_an_example_asks_about_the_video_with_the_retention(engine, run, heading, command, asked):
    answer = '{"summary": "Ein Hund läuft", "people": 0}' if heading == "instructor" else "Ein Hund läuft"
    engine.completion = answering_as(answer)
    printed = await run(command if isinstance(command, list) else command(), code_under(heading))
    assert len(engine.requests) == asked
    for request in engine.requests:
        assert video_in(request) == VIDEO
        assert request["mm_processor_kwargs"] == {"aot_retention": 0.15}
        assert "What happens in this clip?" in json.dumps(request)
    told = "640" if heading == "pydantic-ai" else "627"
    assert len([line for line in printed.splitlines() if told in line]) == asked
    assert "Ein Hund" in printed


FILE = """
from openai import OpenAI
FILE = OpenAI(base_url=BASE_URL, api_key=KEY).files.create(file=Path("clip.mp4"), purpose="user_data").id
"""
OTHER_WAYS = [
    pytest.param(
        """
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
chat = ChatOpenAI(model="llava-fast", base_url=BASE_URL, api_key=KEY, extra_body=AOT)
chat.invoke([HumanMessage(content=[{"type": "file", "file_id": FILE}, QUESTION])])
""",
        id="LangChain",
    ),
    pytest.param(
        """
from llama_index.core.llms import ChatMessage, DocumentBlock, TextBlock
from llama_index.llms.openai_like import OpenAILike
extra = {"extra_body": AOT}
model = OpenAILike(model="llava-fast", api_base=BASE_URL, api_key=KEY, is_chat_model=True, additional_kwargs=extra)
video = DocumentBlock(url="https://media.example.com/clip.mp4", document_mimetype="video/mp4")
model.chat([ChatMessage(blocks=[video, TextBlock(text=QUESTION["text"])])])
""",
        id="LlamaIndex",
    ),
    pytest.param(
        """
import instructor
from pydantic import BaseModel
client = instructor.from_openai(OpenAI(base_url=BASE_URL, api_key=KEY), mode=instructor.Mode.JSON_SCHEMA)
Scene = type("Scene", (BaseModel,), {"__annotations__": {"summary": str}})
for video in (
    {"type": "video_url", "video_url": {"url": "https://media.example.com/clip.mp4"}},
    {"type": "file", "file": {"file_id": FILE}},
):
    messages = [{"role": "user", "content": [video, QUESTION]}]
    client.chat.completions.create(model="llava-fast", response_model=Scene, messages=messages, extra_body=AOT)
""",
        id="instructor",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("code", OTHER_WAYS)
async def test_the_other_ways_of_the_table_lead_to_the_engine(engine, run, code):
    engine.completion = answering_as('{"summary": "Ein Hund"}')
    [beginning] = on(PAGE, "python", "Clients")
    await run(python_with_openai_2(), beginning.text + FILE + code)
    assert [video_in(request) for request in engine.requests] == [VIDEO] * (2 if "instructor" in code else 1)


REFUSALS = [
    pytest.param(
        python_with_openai_2,
        """
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
chat = ChatOpenAI(model="llava-fast", base_url=BASE_URL, api_key=KEY, max_retries=0)
try:
    chat.invoke([HumanMessage(content=[{"type": "video", "base64": CLIP.partition(",")[2], "mime_type": "video/mp4"}])])
except ValueError as exc:
    print("refused", exc)
""",
        id="a video block of LangChain",
    ),
    pytest.param(
        python_with_openai_2,
        """
from llama_index.core.llms import ChatMessage, VideoBlock
from llama_index.llms.openai_like import OpenAILike
model = OpenAILike(model="llava-fast", api_base=BASE_URL, api_key=KEY, is_chat_model=True, max_retries=0)
try:
    model.chat([ChatMessage(blocks=[VideoBlock(path="clip.mp4")])])
except ValueError as exc:
    print("refused", exc)
""",
        id="a VideoBlock of LlamaIndex",
    ),
    pytest.param(
        python_with_openai_3,
        """
from pydantic_ai import Agent, BinaryContent, VideoUrl
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
provider, refused = OpenAIProvider(base_url=BASE_URL, api_key=KEY), 0
for kind in (OpenAIChatModel, OpenAIResponsesModel):
    for video in (VideoUrl("https://media.example.com/clip.mp4"), BinaryContent(b"", media_type="video/mp4")):
        try:
            Agent(kind("llava-fast", provider=provider)).run_sync([video])
        except NotImplementedError:
            refused += 1
assert refused == 4
print("refused")
""",
        id="videos of pydantic-ai",
    ),
    pytest.param(
        node_with_ai_sdk_6,
        """
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText } from "ai";
const model = createOpenAICompatible({ name: "aot", baseURL, apiKey })("llava-fast");
const content = [{ type: "file", mediaType: "video/mp4", data: clip }, question];
try {
  await generateText({ model, maxRetries: 0, messages: [{ role: "user", content }] });
} catch (error) {
  console.log("refused", error.message);
}
""",
        id="a file part of AI SDK 6",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "code"), REFUSALS)
async def test_what_the_page_says_fails_in_the_client_still_fails_there(engine, run, command, code):
    language = "javascript" if "import {" in code else "python"
    [beginning] = on(PAGE, language, "Clients")
    printed = await run(command(), beginning.text + code)
    assert "refused" in printed
    assert engine.requests == []


def pins(file: str) -> dict[str, str]:
    lines = (CLIENTS / file).read_text().splitlines()
    return dict(line.split("==") for line in lines if line)


def test_the_versions_of_the_table_are_those_that_the_tests_install():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("|")]
    told = {re.sub(r"\[(.*?)\].*", r"\1", row[0]): row[1] for row in rows[2:]}
    two, three = pins("requirements.txt"), pins("requirements_openai_3.txt")
    node, node_6 = (
        json.loads((CLIENTS / folder / "package.json").read_text())["dependencies"] for folder in ("", "ai_sdk_6")
    )
    assert told == {
        "curl": "any",
        "httpx": importlib.metadata.version("httpx"),
        "openai for Python": f"{importlib.metadata.version('openai')}, {two['openai']}",
        "openai for Node": node["openai"],
        "AI SDK 7": node["ai"],
        "AI SDK 6": node_6["ai"],
        "LangChain": two["langchain-openai"],
        "LiteLLM": two["litellm"],
        "pydantic-ai": three["pydantic-ai-slim"],
        "LlamaIndex": two["llama-index-core"],
        "instructor": two["instructor"],
    }
    for name, version in (("3.0.92", node), ("2.0.92", node_6)):
        assert version["@ai-sdk/openai-compatible"] == name
        assert f"`@ai-sdk/openai-compatible` {name}" in TEXT


def test_every_section_of_a_client_is_in_the_table_and_has_an_example():
    sections = re.findall(r"^## (.+)$", TEXT, re.MULTILINE)
    assert sections[-1] == "Others"
    assert sections[:-1] == re.findall(r"^\| \[(.+?)\]\(#", TEXT, re.MULTILINE)
    assert {parameters.values[0] for parameters in EXAMPLES} == set(sections[:-1])
