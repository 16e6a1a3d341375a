"""What is under `deploy/grafana`, as Grafana reads it."""

import json

from tests.deploy.rules import ROOT

GRAFANA = ROOT / "deploy" / "grafana"
DASHBOARDS = {path.name: json.loads(path.read_text()) for path in sorted((GRAFANA / "dashboards").glob("*.json"))}


def panels():
    """Return every panel with the name of its dashboard."""
    return [(board["title"], panel) for board in DASHBOARDS.values() for panel in board["panels"]]


def queries():
    """Return every panel's queries, by dashboard, panel and query."""
    return {
        f"{board} / {panel['title']} / {target['refId']}": target["expr"]
        for board, panel in panels()
        for target in panel["targets"]
    }
