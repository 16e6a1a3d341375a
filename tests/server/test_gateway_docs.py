"""docs/gateway.md says what the code does."""

import re
from pathlib import Path

import yaml
from prometheus_client import CollectorRegistry

from server.aliases import load_aliases
from server.errors import ENGINE_VERDICTS, INTERNAL, VERDICTS, ClientGone
from server.metrics import PREFIX as METRIC_PREFIX
from server.metrics import Metrics
from server.parameters import (
    CHOICES,
    LENGTHS,
    LOGPROBS,
    LONGEST_REPETITION,
    MOST_CHARACTERS,
    MOST_ITEMS,
    MOST_LOGPROBS,
    OPERATOR_FIELDS,
)
from server.schemas import MOST_VALUES
from server.settings import PREFIX, Settings
from server.text_requests import MOST_PROMPTS

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "gateway.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading."""
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def shown(default: object) -> str:
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


def test_the_example_configuration_is_one(tmp_path):
    example = re.search(r"```yaml\n(.*?)```", TEXT, re.DOTALL)[1]
    assert yaml.safe_load(example)
    path = tmp_path / "gateway.yaml"
    path.write_text(example)
    assert load_aliases(path)["llava-fast"].max_retention == 0.5


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
