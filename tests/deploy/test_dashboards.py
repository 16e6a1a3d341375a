"""The dashboards are those that the code makes, and show nothing that nobody exports."""

import json
import re
from pathlib import Path

import yaml
from PIL import Image
from prometheus_client import CollectorRegistry, Counter

from aot_vllm.adapters import telemetry
from deploy.grafana.generate import dashboards
from server.observe.metrics import Metrics
from tests.deploy.dashboards import DASHBOARDS, GRAFANA, panels, queries
from tests.deploy.rules import PROMETHEUS, RECORDED, ROOT, RULES, metrics_in


def samples_of(collectors):
    """Return the names under which Prometheus knows what collectors export."""
    names = set()
    for collector in collectors:
        for family in collector.describe():
            endings = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "gauge": ("",)}[family.type]
            names |= {family.name + ending for ending in endings}
    return names


def exported():
    registry = CollectorRegistry()
    gateway = [one for one in vars(Metrics(registry)).values() if one is not registry]
    engine = [one for one in vars(telemetry).values() if isinstance(one, Counter)]
    return samples_of([*gateway, *engine]) | {"aot_gateway_build_info", "up"} | RECORDED.keys()


def test_the_committed_dashboards_are_what_the_code_makes():
    committed = {path.name: path.read_text() for path in (GRAFANA / "dashboards").iterdir()}
    assert committed == dashboards(), "run python -m deploy.grafana.generate"


def test_every_panel_says_what_it_shows_in_which_unit():
    for board, panel in panels():
        where = f"{board} / {panel.get('title')}"
        assert panel["title"], where
        assert panel["description"].endswith("."), where
        assert panel["fieldConfig"]["defaults"]["unit"], where
        assert all(target["legendFormat"] for target in panel["targets"]), where


def test_every_variable_in_a_query_is_one_of_its_dashboard():
    for name, board in DASHBOARDS.items():
        variables = {variable["name"] for variable in board["templating"]["list"]}
        used = set(re.findall(r"\$(?!__)(\w+)", " ".join(t["expr"] for p in board["panels"] for t in p["targets"])))
        assert used == variables, name


def test_dashboards_and_rules_use_only_metrics_that_the_code_exports():
    expressions = queries() | {rule.get("record") or rule["alert"]: rule["expr"] for rule in RULES}
    for where, expression in expressions.items():
        used = metrics_in(expression)
        assert used, where
        unknown = {name for name in used if not name.startswith("vllm:")} - exported()
        assert not unknown, (where, unknown)


def test_every_metric_of_gateway_and_plugin_is_on_a_dashboard_or_in_a_rule():
    used = set().union(*(metrics_in(expression) for expression in queries().values()))
    used |= set().union(*(metrics_in(rule["expr"]) for rule in RULES))
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in used}
    shown = {re.sub(r"_(bucket|count|sum)$", "", name) for name in exported() if name.startswith(("aot_",))}
    assert shown <= families | {"aot_engine_video_tokens_total"}  # the gateway's count is shown: it knows the alias


def test_objectives_are_bounds_of_buckets():
    bounds = set(re.findall(r'le="([\d.]+)"', "".join(RECORDED.values())))
    histogram = Metrics(CollectorRegistry()).time_to_first_token
    assert bounds == {"4.0"}
    assert float(bounds.pop()) in histogram._upper_bounds


def test_dashboards_ask_the_provisioned_source():
    provisioned = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())
    uids = {source["uid"] for source in provisioned["datasources"]}
    assert {target["datasource"]["uid"] for _, panel in panels() for target in panel["targets"]} == uids


def test_the_document_names_every_dashboard_and_every_objective():
    text = (ROOT / "docs" / "operate.md").read_text(encoding="utf-8")
    for board in DASHBOARDS.values():
        assert f"**{board['title'].removeprefix('AOT: ')}**" in text
    assert "99.5%" in text
    assert "4 seconds" in text
    assert {
        job["job_name"] for job in yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    } == {
        "aot-gateway",
        "aot-engine",
    }


def test_the_document_shows_a_picture_of_each_dashboard_with_the_panels_it_has():
    text = (ROOT / "docs" / "operate.md").read_text(encoding="utf-8")
    for name, board in DASHBOARDS.items():
        file = f"dashboards/{Path(name).stem}.png"
        assert f"]({file})" in text
        with Image.open(ROOT / "docs" / file) as picture:
            assert json.loads(picture.info["Description"]) == [panel["title"] for panel in board["panels"]], file
