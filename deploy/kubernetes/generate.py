"""Write Prometheus's rules as the operator's PrometheusRule reads them: `python -m deploy.kubernetes.generate`."""

from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
RULES = FOLDER.parent / "prometheus" / "rules"
MANIFEST = FOLDER / "components" / "monitoring" / "rules.yaml"
HEAD = "# Made from deploy/prometheus/rules by `python -m deploy.kubernetes.generate`.\n"
LEFT_OUT = {"AOTEngineDown"}
"""Engines that the autoscaler has not started are down for the gateways; AOTEngineNotScraped sees those it has."""


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as a block."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def groups() -> list[dict[str, Any]]:
    """Return the groups of rules, without the rules that do not apply on Kubernetes."""
    found = [group for path in sorted(RULES.glob("*.yml")) for group in yaml.safe_load(path.read_text())["groups"]]
    return [
        {**group, "rules": [rule for rule in group["rules"] if rule.get("alert") not in LEFT_OUT]} for group in found
    ]


def manifest() -> str:
    """Return the manifest."""
    document = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "aot"},
        "spec": {"groups": groups()},
    }
    return HEAD + yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=120)


if __name__ == "__main__":
    MANIFEST.write_text(manifest(), encoding="utf-8")
