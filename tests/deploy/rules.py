"""What is under `deploy/prometheus`."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
RULE_FILES = sorted((PROMETHEUS / "rules").glob("*.yml"))
_GROUPS = [group for path in RULE_FILES for group in yaml.safe_load(path.read_text())["groups"]]
RULES = [rule for group in _GROUPS for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDED = {rule["record"]: rule["expr"] for rule in RULES if "record" in rule}
GROUPS = [group["name"] for group in sorted(_GROUPS, key=lambda group: "record" not in group["rules"][0])]
"""Recording ones first."""


def metrics_in(expression):
    """Return the names of the metrics and recorded series in a PromQL expression."""
    without_strings = re.sub(r'"[^"]*"', '""', expression)
    without_labels = re.sub(r"\b(by|on|without|group_left|ignoring) ?\([^)]*\)", "", without_strings)
    return set(re.findall(r"\b(?:aot_gateway_|aot_engine_|vllm:|aot:|up\b)[\w:]*", without_labels))
