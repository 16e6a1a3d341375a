"""What the documents tell to type, typed, or checked as far as a machine without a GPU, Docker and a cluster can."""

import ast
import asyncio
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
import yaml

from server.settings import Settings
from tests.deploy.files import composed
from tests.deploy.rules import metrics_in
from tests.docs.blocks import BLOCKS, PAGES, ROOT, Block, on
from tests.programs import needs
from tests.server.clips import clip, data_url
from tests.server.engines.profiles import ONEVISION
from tests.server.harness import free_port, gateway, served, until_true

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
SERVICES = composed(AOT_MODEL="m")["services"]
PROFILES = {profile for service in SERVICES.values() for profile in service.get("profiles", ())}
COMPOSE_OPTIONS = {
    "build": set(),
    "down": set(),
    "exec": set(),
    "logs": {"--follow", "--since"},
    "ps": set(),
    "restart": set(),
    "up": {"--build", "--detach", "--no-deps"},
}
ENVIRONMENT = (ROOT / "demo" / "environment.py").read_text(encoding="utf-8")
PROGRAMS = r"python3? -m |python bench/|make |pip install |docker compose |kubectl "


def words(command: str) -> list[str]:
    """The words of a command, without its variables and comments."""
    split = shlex.split(command.replace("\\\n", " "), comments=True)
    while re.match(r"\w+=", split[0]):
        split.pop(0)
    return split


def in_prose() -> list[tuple[str, str]]:
    """The pages and the commands that stand in a line of their text."""
    found = []
    for page in PAGES:
        prose = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
        found += [(str(page.relative_to(ROOT)), span) for span in spans if re.match(PROGRAMS, span)]
    return found


def commands(begins: str, *, prose: bool = True) -> list[pytest.param]:
    """The commands of all pages that begin so, from their blocks and from their text."""
    typed = [(str(block), command) for block in BLOCKS for command in block.commands if block.language == "console"]
    found = [*typed, *(in_prose() if prose else ())]
    matching = {(where, command) for where, command in found if re.match(rf"(?:\w+=\S+ )?(?:{begins})", command)}
    assert matching, begins
    return [pytest.param(command, id=f"{where} {command[:40]}") for where, command in sorted(matching)]


def ran(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "HOME": str(cwd), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_commands_in_the_text_are_found():
    assert ("README.md", "python bench/gpu.py") in in_prose()
    assert len(in_prose()) > 40


@pytest.mark.parametrize("command", commands("make "))
def test_make_knows_what_it_is_told_to_make(command):
    made = ran("make", "--dry-run", *words(command)[1:])
    assert made.returncode == 0, made.stderr
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    variables = {word.partition("=")[0] for word in words(command)[2:]}
    used = set(re.findall(r"\$\((?:if \$\()?(\w+)", makefile)) | set(re.findall(r'environ\w*\W+"(\w+)"', ENVIRONMENT))
    assert variables <= used


@pytest.mark.parametrize("command", commands("pip install "))
def test_pip_is_told_of_extras_and_files_that_there_are(command):
    """Also that this project comes from a checkout: no index has it."""
    arguments = words(command)[2:]
    while "-c" in arguments:
        at = arguments.index("-c")
        assert (ROOT / arguments[at + 1]).is_file()
        del arguments[at : at + 2]
    [target] = arguments
    extras = re.fullmatch(r"\.\[([a-z,-]+)\]", target)[1].split(",")
    assert set(extras) <= set(EXTRAS)


@pytest.mark.parametrize("command", commands("docker compose "))
def test_docker_compose_is_told_of_services_that_there_are(command):
    arguments = words(command)[2:]
    while arguments[0] == "--profile":
        assert arguments[1] in PROFILES
        del arguments[:2]
    verb, *rest = arguments
    options = {word for word in rest if word.startswith("-")}
    assert options <= COMPOSE_OPTIONS[verb]
    if "--since" in rest:
        at = rest.index("--since")
        assert re.fullmatch(r"\d+[smh]", rest.pop(at + 1))
    named = rest[:1] if verb == "exec" else [word for word in rest if not word.startswith("-")]
    assert set(named) <= set(SERVICES)


@needs("promtool")
@pytest.mark.parametrize("command", commands("docker compose exec prometheus ", prose=False))
def test_prometheus_is_asked_in_its_language(command, tmp_path):
    program, *_, expression = words(command)[4:]
    assert program == "promtool"
    is_a_query(expression, tmp_path)


@needs("kubectl")
@pytest.mark.parametrize("command", commands("kubectl ", prose=False))
def test_kubectl_takes_the_command(command, tmp_path):
    """It gets as far as to call the cluster, after it has read its options and files."""
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    (tmp_path / "gateway.yaml").write_text("{}")
    called = ran(
        *("bash", "-euc", command.replace("kubectl ", "kubectl --server=http://127.0.0.1:9 ", 1)),
        cwd=tmp_path,
        METRICS_KEY="key",
    )
    assert called.returncode != 0
    assert re.search("connection refused|was refused", called.stderr), called.stderr


@needs("kubectl")
def test_kubectl_does_not_call_the_cluster_if_it_does_not_take_a_command(tmp_path):
    for wrong in ("-n aot logs --sinc=15m deployment/gateway", "apply -k deploy/nowhere", "label a b=c --overwrit"):
        assert "refused" not in ran("kubectl", "--server=http://127.0.0.1:9", *wrong.split(), cwd=tmp_path).stderr


def started(command: str, port: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["bash", "-c", f"exec env {command}"],
        cwd=ROOT,
        env={"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "AOT_GATEWAY_PORT": str(port)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("command", commands("python -m server$", prose=False))
async def test_the_gateway_starts_and_serves_the_engines(command, engine):
    port = free_port()
    assert "http://127.0.0.1:8000" in command
    process = started(command.replace("http://127.0.0.1:8000", engine.url), port)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:

            async def ready():
                assert process.poll() is None
                try:
                    return (await client.get("/health/ready")).status_code == 200
                except httpx.TransportError:
                    return False

            await until_true(ready)
            models = (await client.get("/v1/models")).json()["data"]
        assert [model["id"] for model in models] == engine.models
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait, 20)


@pytest.mark.parametrize("command", commands(r"\. \.venv/", prose=False))
def test_the_environment_is_entered_where_it_is_made(command, tmp_path):
    assert 'ROOT / (".venv-gateway" if arguments.gateway_tests else ".venv")' in ENVIRONMENT
    ran(sys.executable, "-m", "venv", "--without-pip", ".venv", cwd=tmp_path)
    entered = ran("sh", "-euc", f"{command}; python -c 'import sys; print(sys.prefix)'", cwd=tmp_path)
    assert entered.stdout.strip() == str(tmp_path / ".venv"), entered.stderr


LOCUST = """
import sys
sys.path.insert(0, "loadtest")
import locustfile
from locust.argument_parser import parse_options
parse_options(sys.argv[1:])
"""


@pytest.mark.parametrize("command", commands("python -m locust ", prose=False))
def test_locust_takes_the_options(command):
    arguments = ["127.0.0.1" if word == "…" else word for word in words(command)[3:]]
    if arguments[-2] == "--headless":  # further options may follow
        arguments.pop()
    parsed = ran(sys.executable, "-c", LOCUST, *arguments)
    assert parsed.returncode == 0, parsed.stderr


def in_a_moment(command: str, host: str) -> list[str]:
    """A command of docs/loadtest.md against this host, with few small videos, and over after three seconds."""
    arguments = words(command)[3:]
    for name, value in (("--host", host), ("--run-time", "3s"), ("--users", "2")):
        if name in arguments:
            arguments[arguments.index(name) + 1] = value
    for name in ("--csv", "--html"):
        if name in arguments:
            at = arguments.index(name)
            del arguments[at : at + 2]
    small = ("--sizes", "64x48", "--frames", "8", "--clips", "1", "--max-tokens", "4")
    return [sys.executable, "-m", "locust", *arguments, *small]


async def test_the_load_test_runs_as_documented(engine):
    [block] = [block for block in on("docs/loadtest.md", "console") if "--slo-ttft-p95" in block.text]
    [command] = [command for command in block.commands if "locust" in command]
    async with served(Settings(engines=(engine.url,))) as url:
        done = await asyncio.to_thread(ran, *in_a_moment(command, url), AOT_API_KEY="any")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    retentions = {request.get("mm_processor_kwargs", {}).get("aot_retention") for request in engine.requests}
    assert {1.0, 0.1} <= retentions


@pytest.mark.slow
async def test_a_master_and_its_workers_run_as_documented(engine):
    [block] = [block for block in on("docs/loadtest.md", "console") if "--master" in block.text]
    master, worker = ([word for word in words(command) if word != "…"] for command in block.commands)
    assert worker[-1] == "--master-host"
    port = str(free_port())
    async with served(Settings(engines=(engine.url,))) as url:
        told = ["--host", url, "--users", "2", "--run-time", "3s", "--arms", "all=llava@1", "--master-bind-port", port]
        workers = [" ".join([*worker, "127.0.0.1", "--master-port", port])] * 2
        commands = [in_a_moment(command, url) for command in (" ".join([*master, *told]), *workers)]
        ended = await asyncio.gather(*(asyncio.to_thread(ran, *command) for command in commands))
    assert [process.returncode for process in ended] == [0, 0, 0], [process.stderr[-2000:] for process in ended]
    assert engine.requests


def test_locust_takes_no_other_options():
    assert ran(sys.executable, "-c", LOCUST, "--headless", "--rate", "1").returncode == 2


def options_of(source: Path) -> set[str]:
    """The options that a script's parsers add."""
    calls = [node for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    added = [call for call in calls if getattr(call.func, "attr", "") == "add_argument"]
    return {argument.value for call in added for argument in call.args if isinstance(argument, ast.Constant)}


def modules_of(name: str) -> Path:
    if not (spec := find_spec(name)) or not spec.origin:
        raise ModuleNotFoundError(name)
    return Path(spec.origin)


@pytest.mark.parametrize("command", commands(r"python bench/|python3? -m (?!server$|locust)"))
def test_a_script_takes_the_options(command):
    _, *rest = words(command)
    script = modules_of(rest[1]) if rest[0] == "-m" else ROOT / rest[0]
    if script.name == "__init__.py":
        script = script.with_name("__main__.py")
    options = {word for word in rest[1:] if word.startswith("--")}
    assert options <= options_of(script)


@pytest.mark.parametrize("command", commands(r"bench/\S+\.sh ", prose=False))
def test_a_shell_script_is_one_and_what_it_runs_takes_the_options(command):
    script, *rest = words(command)
    assert os.access(ROOT / script, os.X_OK)
    assert ran("bash", "-n", script).returncode == 0
    [runs] = re.findall(r"^exec \S+ (bench/\S+\.py)", (ROOT / script).read_text(encoding="utf-8"), re.MULTILINE)
    assert {word for word in rest if word.startswith("--")} <= options_of(ROOT / runs)


async def test_the_readmes_question_is_answered_with_what_was_saved(engine, tmp_path):
    [block] = on("README.md", "python")
    example, _, told = block.text.strip().rpartition("  # ")
    assert example.endswith("answer.usage.video_tokens")
    engine.models = re.findall(r'model="(.*?)"', example)
    code = example.replace("data:video/mp4;base64,…", data_url(clip(), "video/mp4"))
    assert code != example
    async with served(Settings(engines=(engine.url,))) as url:
        code = code.replace("http://127.0.0.1:8080", url)
        code = re.sub(r"^(answer\.usage.*)$", r"print(\1)", code, flags=re.MULTILINE)
        printed = await asyncio.to_thread(ran, sys.executable, "-c", code, cwd=tmp_path)
    assert printed.returncode == 0, printed.stderr
    saved = ast.literal_eval(printed.stdout)
    assert saved == {"before": 6272, "after": 627, "retention": 0.1}
    [request] = engine.requests
    assert request["mm_processor_kwargs"] == {"aot_retention": 0.15}
    counts = ast.literal_eval(told)
    assert set(counts) == set(saved)
    assert counts == {"before": 32 * 196 + 1, "after": round(0.15 * 32 * 196) + 1, "retention": 0.15}


def shape(value: object) -> object:
    """The keys and types of a JSON value; whole numbers may stand where others do."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape(inner) for inner in value]
    return "number" if isinstance(value, int | float) else type(value).__name__


async def test_the_answer_about_tokens_is_one(engine):
    [block] = [block for block in on("docs/gateway.md", "json") if "video.tokens" in block.text]
    told = json.loads(block.text)
    engine.profile = ONEVISION | {"reduction": {"active": True, "retention": 0.1}, "context_length": 32768}
    async with gateway(engine) as client:
        part = {"type": "video_url", "video_url": {"url": data_url(clip(), "video/mp4")}}
        body = {"model": "llava", "messages": [{"role": "user", "content": [part]}]}
        answer = await client.post("/v1/video/tokens", json=body)
    assert answer.status_code == 200, answer.text
    assert shape(told) == shape(answer.json())
    [video] = told["videos"]
    tokens = video["frames"] * 196
    assert told["video_tokens"] == video["video_tokens"] == {"before": tokens + 1, "after": round(tokens * 0.1) + 1}


def is_a_query(expression: str, directory: Path) -> None:
    rules = {"groups": [{"name": "documents", "rules": [{"record": "document:query", "expr": expression}]}]}
    (directory / "rules.yml").write_text(yaml.safe_dump(rules))
    checked = ran("promtool", "check", "rules", str(directory / "rules.yml"))
    assert checked.returncode == 0, checked.stdout + checked.stderr


def exported() -> set[str]:
    """The metrics that the gateway's documentation lists, which is tested against the code."""
    table = (ROOT / "docs" / "gateway.md").read_text(encoding="utf-8").split("\n## Metrics\n")[1]
    return {f"aot_gateway_{name}" for name in re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)}


@needs("promtool")
@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "promql"], ids=str)
def test_a_query_is_one_and_asks_for_metrics_that_there_are(block: Block, tmp_path):
    is_a_query(block.text, tmp_path)
    assert metrics_in(block.text)
    assert metrics_in(block.text) <= exported()


def test_the_adapters_queries_ask_for_metrics_that_there_are():
    [block] = on("docs/kubernetes.md", "yaml")
    asked = {metric for rule in yaml.safe_load(block.text)["rules"] for metric in metrics_in(rule["seriesQuery"])}
    of_the_gateway = {metric for metric in asked if metric.startswith("aot_gateway_")}
    assert of_the_gateway
    assert of_the_gateway <= exported()
    [of_the_engine] = asked - of_the_gateway
    assert f'"{of_the_engine}"' in (modules_of("vllm").parent / "v1" / "metrics" / "loggers.py").read_text()


def test_the_last_lines_of_a_corpus_are_those_of_the_script(tmp_path):
    [command] = [command for block in on("docs/media.md", "console") for command in block.commands]
    (tmp_path / "clip.mp4").write_bytes(clip())
    (tmp_path / "none.mp4").write_bytes(b"no video")
    _, script, _ = words(command)
    done = ran(sys.executable, str(ROOT / script), str(tmp_path), cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    [told] = on("docs/media.md", "text")
    first, second = done.stdout.strip().splitlines()[-2:]
    in_words = [re.sub(r"\d+|\(.*\)", "N", line) for line in told.text.strip().splitlines()]
    assert re.sub(r"\d+|\(.*\)", "N", first) == in_words[0]
    assert first.startswith("2 files: 1 taken, 1 refused")
    assert second.startswith("taken: 1 agree with a full decode")
    counts = [int(number) for number in re.findall(r"\d+", told.text)]
    files, taken, refused, *rest = counts
    assert files == taken + refused
    assert refused == sum(rest[:3])
    assert taken == sum(rest[3:])
