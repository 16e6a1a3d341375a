"""docs/gateway.md matches the code."""

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from server.configuration import load
from server.errors import ENGINE_VERDICTS, INTERNAL, VERDICTS, ClientGone
from server.keys import digest_of, new_key
from server.observe.metrics import PREFIX as METRIC_PREFIX
from server.observe.metrics import Metrics
from server.requests.fields import MOST_VALUES
from server.requests.parameters import (
    CHOICES,
    LENGTHS,
    LOGPROBS,
    LONGEST_REPETITION,
    MOST_CHARACTERS,
    MOST_ITEMS,
    MOST_LOGPROBS,
    OPERATOR_FIELDS,
)
from server.requests.text import MOST_PROMPTS
from server.settings import PREFIX, Settings
from tests.programs import needs
from tests.server.clips import longer_than_an_argument
from tests.server.harness import served

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "gateway.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """The rows of the table under a heading, each a list of cells."""
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def shown(default: object) -> str:
    if isinstance(default, SecretStr):
        default = default.get_secret_value()
    if default is None:
        return "none"
    if isinstance(default, tuple):
        return f"`{','.join(default)}`" if default else "empty"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def test_the_settings_table_lists_exactly_the_settings_with_their_defaults():
    documented = {quoted(row[0])[0]: row[1] for row in rows("Settings")}
    actual = {PREFIX + name.upper(): shown(field.default) for name, field in Settings.model_fields.items()}
    assert documented == actual
    assert all(row[2] for row in rows("Settings"))


def test_the_metrics_table_lists_exactly_the_metrics_with_their_labels():
    documented = {quoted(row[0])[0]: quoted(row[1]) for row in rows("Metrics")}
    metrics = vars(Metrics(CollectorRegistry())).values()
    actual = {}
    for collector in metrics:
        if isinstance(collector, CollectorRegistry):
            continue
        (family,) = collector.describe()
        name = family.name + ("_total" if family.type == "counter" else "")
        actual[name.removeprefix(METRIC_PREFIX)] = list(collector._labelnames)
    actual["build_info"] = ["version"]
    assert documented == actual


def test_the_error_table_lists_every_status_and_default_code():
    documented = {(int(row[0]), code) for row in rows("Errors") for code in quoted(row[1])}
    verdicts = [v for kind, v in VERDICTS.items() if kind is not ClientGone]
    actual = {(v.status, v.code or "null") for v in (*verdicts, *ENGINE_VERDICTS.values(), INTERNAL)}
    assert actual <= documented
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "server").rglob("*.py"))
    assert all(code == "null" or f'"{code}"' in sources for _, code in documented)


def test_the_error_table_names_the_headers():
    for row in rows("Errors"):
        verdicts = [v for v in (*VERDICTS.values(), INTERNAL) if v.status == int(row[0])]
        assert ("`retry-after`" in row[3]) == any(v.retry_after_seconds is not None for v in verdicts), row
        assert ("`x-should-retry: false`" in row[3]) == any(v.retry_is_waste for v in verdicts), row


def blocks(language: str) -> list[str]:
    """The code examples in a language."""
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_the_example_configuration_is_one(tmp_path):
    path = tmp_path / "gateway.yaml"
    path.write_text("".join(blocks("yaml")))
    configuration = load(path)
    assert configuration.aliases["llava-fast"].max_retention == 0.5
    assert configuration.tenants["globex"].models == ("llava-fast",)


@pytest.fixture
async def run_example(engine, tmp_path):
    """Runs a command against a gateway with the example configuration, next to a clip; returns its output."""
    key, metrics_key = new_key(), new_key()
    (tmp_path / "clip.mp4").write_bytes(longer_than_an_argument())
    (tmp_path / "files").mkdir()
    engine.models = ["llava-hf/llava-onevision-qwen2-7b-ov-hf"]
    config = tmp_path / "gateway.yaml"
    written = re.sub(r"[0-9a-f]{64}", digest_of(key.encode()), "".join(blocks("yaml")), count=1)
    config.write_text(re.sub(r'(?<=metrics_keys: \[\{sha256: ")\w+', digest_of(metrics_key.encode()), written))
    settings = Settings(engines=(engine.url,), config=config, files_dir=tmp_path / "files")
    async with served(settings) as url:

        async def run(*command: str) -> str:
            ended = await asyncio.to_thread(
                subprocess.run,
                [part.replace("http://127.0.0.1:8080", url) for part in command],
                cwd=tmp_path,
                env={"PATH": os.environ["PATH"], "AOT_API_KEY": key, "AOT_METRICS_KEY": metrics_key},
                capture_output=True,
                text=True,
                timeout=120,
            )
            assert ended.returncode == 0, ended.stderr + ended.stdout
            return ended.stdout

        run.directory = tmp_path
        yield run


async def test_the_examples_with_the_sdk_run(run_example):
    printed = await run_example(sys.executable, "-c", "\n".join(blocks("python")))
    answer, tokens, file = printed.splitlines()
    assert answer.startswith("Ein Hund")
    assert "'after': 627" in answer
    assert tokens == "400000 of 400000 tokens left"
    assert re.fullmatch(r"file-[0-9a-f]{32} 2\.0 seconds \['clip\.mp4'\]", file)
    assert (run_example.directory / "copy.mp4").read_bytes() == longer_than_an_argument()


def example_usage() -> dict:
    return next(shown for shown in map(json.loads, blocks("json")) if shown["object"] == "usage")


def test_the_example_of_usage_adds_up():
    shown = example_usage()
    assert {**shown["total"], **{name: shown["data"][0][name] for name in ("date", "model")}} == shown["data"][0]
    tokens = shown["total"]["video_tokens"]
    assert tokens["saved"] == tokens["before"] - tokens["after"]


@needs("curl")
async def test_the_examples_with_curl_run(run_example):
    commands = [
        block.removeprefix("$ ") for block in blocks("console") if re.search(r"^\s*(\$ )?curl ", block, re.MULTILINE)
    ]
    assert len(commands) >= 2
    printed = [
        await run_example("bash", "-euo", "pipefail", "-c", command.replace("curl", "curl -sS --fail-with-body", 1))
        for command in commands
    ]
    assert json.loads(printed[0])["usage"]["video_tokens"]["after"] == 627
    usage = json.loads(printed[1])
    assert usage["total"]["video_tokens"] == {"before": 6272, "after": 627, "saved": 5645}
    assert usage.keys() == example_usage().keys()
    assert usage["data"][0].keys() == example_usage()["data"][0].keys()
    table = (run_example.directory / "usage.csv").read_text().splitlines()
    assert all(f"`{column}`" in TEXT for column in table[0].split(","))
    assert len(table) == 2
    assert json.loads(printed[3])["filename"] == "clip.mp4"


def test_the_table_of_fields_names_every_rule_and_its_bound():
    table = {name: row[1] for row in rows("What a request may set") for name in quoted(row[0])}
    assert set(OPERATOR_FIELDS) <= set(table)
    assert all(table[name].startswith("refused") for name in OPERATOR_FIELDS)
    assert {*CHOICES, *LENGTHS, *LOGPROBS, *MOST_ITEMS, *MOST_CHARACTERS} <= set(table)
    for name, most in MOST_ITEMS.items():
        assert re.search(rf"\b{most}\b", table[name]), name
    for name, most in MOST_CHARACTERS.items():
        shown = f"{most // 1024} Ki" if most > 4096 else str(most)
        assert name == "repetition_detection" or shown in table[name], name
    assert str(MOST_PROMPTS) in table["prompt"]
    assert f"0 to {MOST_LOGPROBS}" in table["logprobs"]
    assert str(LONGEST_REPETITION) in table["repetition_detection"]
    assert f"{MOST_VALUES:,} JSON values" in TEXT
