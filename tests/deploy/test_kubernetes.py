"""deploy/kubernetes: what kustomize makes of it is valid, locked down, and agrees with the gateway."""

import copy
import ipaddress
import json
import re
import subprocess
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from deploy.kubernetes.generate import LEFT_OUT, MANIFEST, manifest
from server.__main__ import LAST_WORDS_SECONDS
from server.media.addresses import is_public
from server.settings import PREFIX, Settings, refuse_unknown_names
from tests.deploy.custom_kinds import validate
from tests.deploy.files import ROOT
from tests.deploy.rules import ALERTS, PROMETHEUS, RECORDED
from tests.programs import needs

MANIFESTS = ROOT / "deploy" / "kubernetes"
WORKLOADS = {"Deployment", "StatefulSet", "Job"}
with_kubectl = needs("kubectl")


def read(text: str) -> list[dict]:
    return [document for document in yaml.safe_load_all(text) if document]


def sources() -> list[Path]:
    return [
        path
        for path in sorted(MANIFESTS.rglob("*.yaml"))
        if path.name not in ("kustomization.yaml", "llm-d-values.yaml")
    ]


def rendered(overlay: str) -> list[dict]:
    command = ["kubectl", "kustomize", str(MANIFESTS / "overlays" / overlay)]
    return read(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)


def of(documents: list[dict], kind: str, name: str) -> dict:
    [found] = [d for d in documents if d["kind"] == kind and d["metadata"]["name"].startswith(name)]
    return found


def pods(documents: list[dict]) -> list[dict]:
    plain = [d["spec"]["template"]["spec"] for d in documents if d["kind"] in WORKLOADS]
    groups = [d["spec"]["leaderWorkerTemplate"] for d in documents if d["kind"] == "LeaderWorkerSet"]
    return plain + [group[part]["spec"] for group in groups for part in ("leaderTemplate", "workerTemplate")]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(MANIFESTS)))
def test_each_manifest_is_valid(path):
    for document in read(path.read_text()):
        validate(document)


@pytest.mark.parametrize(
    ("path", "kind", "keys", "wrong"),
    [
        ("components/monitoring/monitors.yaml", "ServiceMonitor", ("endpoints", 0, "prot"), "http"),
        ("components/monitoring/rules.yaml", "PrometheusRule", ("groups", 0, "rules", 0, "record"), "both:an_alert"),
        ("examples/leader-worker-set.yaml", "LeaderWorkerSet", ("leaderWorkerTemplate", "sise"), 2),
        (
            "examples/leader-worker-set.yaml",
            "LeaderWorkerSet",
            ("leaderWorkerTemplate", "workerTemplate", "spec", "container"),
            [],
        ),
    ],
)
def test_a_slip_of_the_pen_is_not_valid(path, kind, keys, wrong):
    document = copy.deepcopy(next(d for d in read((MANIFESTS / path).read_text()) if d["kind"] == kind))
    inner = document["spec"]
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = wrong
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        validate(document)


@with_kubectl
@pytest.mark.parametrize("overlay", ["one-gpu", "replicas"])
def test_what_an_overlay_renders_is_valid_and_its_services_find_pods(overlay):
    documents = rendered(overlay)
    for document in documents:
        validate(document)
        assert document["metadata"]["namespace"] == "aot"
    labels = [d["spec"]["template"]["metadata"]["labels"] for d in documents if d["kind"] in WORKLOADS]
    selectors = [d["spec"]["selector"] for d in documents if d["kind"] == "Service"]
    assert len(selectors) >= 2
    for selector in selectors:
        assert sum(selector.items() <= of_pod.items() for of_pod in labels) == 1


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(MANIFESTS)))
def test_no_container_is_more_than_it_needs_to_be(path):
    for pod in pods(read(path.read_text())):
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"]


@with_kubectl
@pytest.mark.parametrize("overlay", ["one-gpu", "replicas"])
def test_the_gateways_environment_is_one_it_starts_with(overlay, monkeypatch):
    documents = rendered(overlay)
    environment = dict(of(documents, "ConfigMap", "gateway")["data"])
    [container] = of(documents, "Deployment", "gateway")["spec"]["template"]["spec"]["containers"]
    secret = {entry["name"]: "s" * 32 for entry in container["env"]}
    refuse_unknown_names({**environment, **secret})
    for name, value in {**environment, **secret}.items():
        assert name.startswith(PREFIX)
        monkeypatch.setenv(name, value)
    settings = Settings.from_environment()
    assert settings.media_handoff == "inline"
    most = [
        d["spec"]["maxReplicas"]
        for d in documents
        if d["kind"] == "HorizontalPodAutoscaler" and d["metadata"]["name"] == "engine"
    ]
    assert settings.engines == tuple(f"http://engine-{i}.engine:8000" for i in range(most[0] if most else 1))


@with_kubectl
def test_pods_are_given_the_time_they_need_to_drain():
    documents = rendered("one-gpu")
    drain = float(of(documents, "ConfigMap", "gateway")["data"]["AOT_GATEWAY_DRAIN_SECONDS"])
    pod = of(documents, "Deployment", "gateway")["spec"]["template"]["spec"]
    rest = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > rest + drain + LAST_WORDS_SECONDS
    pod = of(documents, "StatefulSet", "engine")["spec"]["template"]["spec"]
    [shutdown] = [a for a in pod["containers"][0]["args"] if a.startswith("--shutdown-timeout=")]
    rest = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > rest + float(shutdown.partition("=")[2])
    assert float(shutdown.partition("=")[2]) >= drain, "an engine must not end before the streams of a draining gateway"


def policies() -> dict[str, dict]:
    documents = read((MANIFESTS / "base" / "network.yaml").read_text())
    return {document["metadata"]["name"]: document["spec"] for document in documents}


def test_engines_are_reached_by_the_gateway_alone_and_reach_nobody():
    engine = policies()["engine"]
    assert engine["egress"] == []
    [rule] = engine["ingress"]
    assert rule["from"] == [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "gateway"}}}]
    assert rule["ports"] == [{"port": 8000}]
    assert "engine" not in policies()["public-web"]["podSelector"]["matchExpressions"][0]["values"]


@pytest.mark.parametrize(
    "address",
    [
        *("10.1.2.3", "172.31.0.1", "192.168.1.1", "127.0.0.1", "169.254.169.254", "100.100.100.200", "168.63.129.16"),
        *("192.0.0.192", "198.18.0.1", "224.0.0.1", "255.255.255.255", "0.0.0.0", "fd00:ec2::254", "fe80::1", "::1"),
        *("64:ff9b::a9fe:a9fe", "::ffff:10.0.0.1", "2002:a00::1", "2001::1", "1.1.1.1", "2606:4700::1111"),
    ],
)
def test_the_public_web_is_what_the_gateway_takes_for_public(address):
    blocks = [to["ipBlock"] for to in policies()["public-web"]["egress"][1]["to"]]
    parsed = ipaddress.ip_address(address)
    allowed = any(
        parsed in ipaddress.ip_network(block["cidr"])
        and not any(parsed in ipaddress.ip_network(hole) for hole in block["except"])
        for block in blocks
    )
    assert allowed == (is_public(address) and address not in ("64:ff9b::a9fe:a9fe",))
    assert policies()["public-web"]["egress"][1]["ports"] == [{"port": 443}]


def test_the_rules_are_those_of_prometheus_but_for_engines_that_are_not_scaled_up_to():
    assert MANIFEST.read_text() == manifest(), "run python -m deploy.kubernetes.generate"
    [document] = read(manifest())
    rules = [rule for group in document["spec"]["groups"] for rule in group["rules"]]
    assert {rule["record"]: rule["expr"] for rule in rules if "record" in rule} == RECORDED
    alerts = {rule["alert"]: rule for rule in rules if "alert" in rule}
    assert alerts == {name: alert for name, alert in ALERTS.items() if name not in LEFT_OUT}
    assert ALERTS.keys() >= LEFT_OUT


def test_jobs_have_the_names_that_the_rules_and_dashboards_ask_for():
    monitors = read((MANIFESTS / "components" / "monitoring" / "monitors.yaml").read_text())
    named = {
        monitor["metadata"]["name"]: relabeling["replacement"]
        for monitor in monitors
        for endpoint in monitor["spec"]["endpoints"]
        for relabeling in endpoint["relabelings"]
        if relabeling["targetLabel"] == "job"
    }
    assert named == {"gateway": "aot-gateway", "engine": "aot-engine"}
    scraped = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    assert set(named.values()) == {job["job_name"] for job in scraped}
    services = {
        document["metadata"]["name"]: document
        for name in ("engine", "gateway")
        for document in read((MANIFESTS / "base" / f"{name}.yaml").read_text())
        if document["kind"] == "Service"
    }
    for monitor in monitors:
        service = services[monitor["metadata"]["name"]]
        assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
        assert {e["port"] for e in monitor["spec"]["endpoints"]} <= {port["name"] for port in service["spec"]["ports"]}


@with_kubectl
def test_autoscalers_know_metrics_that_there_are_and_replicas_are_left_to_them():
    documents = rendered("replicas")
    scaled = [d for d in documents if d["kind"] == "HorizontalPodAutoscaler"]
    assert {d["spec"]["metrics"][0]["pods"]["metric"]["name"] for d in scaled} == {
        "aot_gateway_queue_depth",
        "vllm_num_requests_waiting",
    }
    document = (ROOT / "docs" / "kubernetes.md").read_text()
    adapter = yaml.safe_load(re.search(r"```yaml\n(rules:.*?)```", document, re.DOTALL)[1])["rules"]
    named = {rule.get("name", {}).get("as") or rule["seriesQuery"].partition("{")[0] for rule in adapter}
    assert named == {d["spec"]["metrics"][0]["pods"]["metric"]["name"] for d in scaled}
    for scaler in scaled:
        target = scaler["spec"]["scaleTargetRef"]
        assert "replicas" not in of(documents, target["kind"], target["name"])["spec"]


@with_kubectl
def test_llm_ds_router_finds_the_engines_and_may_reach_them():
    examples = MANIFESTS / "examples"
    servers = yaml.safe_load((examples / "llm-d-values.yaml").read_text())["router"]["modelServers"]
    pod = of(rendered("replicas"), "StatefulSet", "engine")["spec"]["template"]
    assert servers["matchLabels"].items() <= pod["metadata"]["labels"].items()
    [port] = pod["spec"]["containers"][0]["ports"]
    assert servers["targetPorts"] == [{"number": port["containerPort"]}]
    engines, gateways = (d["spec"] for d in read((examples / "llm-d-network.yaml").read_text()))
    assert engines["podSelector"]["matchLabels"] == servers["matchLabels"]
    assert engines["ingress"][0]["ports"] == [{"port": port["containerPort"]}]
    assert engines["ingress"][0]["from"] == gateways["egress"][0]["to"]


@with_kubectl
def test_the_secrets_that_the_document_creates_are_those_that_are_read():
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    created = {
        name: set(re.findall(r"--from-(?:literal|file)=([\w.]+)", rest))
        for name, rest in re.findall(r"create secret generic (\S+) (.*)$", text, re.MULTILINE)
    }
    documents = rendered("replicas")
    wanted: dict[str, set[str]] = {}
    for pod in pods(documents):
        keys = [e["valueFrom"]["secretKeyRef"] for c in pod["containers"] for e in c.get("env", []) if "valueFrom" in e]
        for key in keys:
            if not key.get("optional"):
                wanted.setdefault(key["name"], set()).add(key["key"])
        for volume in pod.get("volumes", []):
            parts = [p["secret"] for p in volume.get("projected", {}).get("sources", [])]
            parts += [volume["secret"]] if "secret" in volume else []
            for part in parts:
                name = part.get("name") or part["secretName"]
                wanted.setdefault(name, set()).update(item["key"] for item in part["items"])
    for monitor in (d for d in documents if d["kind"] == "ServiceMonitor"):
        for endpoint in monitor["spec"]["endpoints"]:
            if "authorization" in endpoint:
                credentials = endpoint["authorization"]["credentials"]
                wanted.setdefault(credentials["name"], set()).add(credentials["key"])
    assert created == wanted


@with_kubectl
def test_the_dashboards_fit_into_a_config_map():
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    [command] = re.findall(r"^\$ (kubectl .* create configmap .*)$", text, re.MULTILINE)
    made = subprocess.run(
        [*command.split(), "--dry-run=client", "--output=json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    data = json.loads(made.stdout)["data"]
    assert set(data) == {path.name for path in (ROOT / "deploy" / "grafana" / "dashboards").iterdir()}
    assert len(made.stdout.encode()) < 2**20
