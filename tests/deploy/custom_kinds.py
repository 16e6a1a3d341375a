"""What the kinds that Kubernetes does not know itself may hold, as far as `deploy/kubernetes` uses them."""

from typing import Any

import jsonschema
import kubernetes_validate

VERSION = "1.37"
TEXT = {"type": "string", "minLength": 1}
DURATION = {"type": "string", "pattern": r"^(\d+h)?(\d+m)?(\d+s)?$", "minLength": 2}
TEXTS = {"type": "object", "additionalProperties": TEXT}
ANYTHING = {"type": "object"}


def fields(*required: str, **known: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an object with these fields and no others."""
    return {"type": "object", "properties": known, "required": list(required), "additionalProperties": False}


def some(item: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a list with at least one of these."""
    return {"type": "array", "items": item, "minItems": 1}


RECORDING = fields("record", "expr", record=TEXT, expr=TEXT)
ALERT = fields("alert", "expr", alert=TEXT, expr=TEXT, **{"for": DURATION}, labels=TEXTS, annotations=TEXTS)
ENDPOINT = fields(
    "port",
    port=TEXT,
    path=TEXT,
    interval=DURATION,
    authorization=fields("credentials", credentials=fields("key", name=TEXT, key=TEXT)),
    relabelings=some(fields(targetLabel=TEXT, replacement=TEXT)),
)
GROUP = fields(
    "workerTemplate",
    size={"type": "integer", "minimum": 1},
    restartPolicy={"enum": ["RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"]},
    leaderTemplate=ANYTHING,
    workerTemplate=ANYTHING,
)
KINDS = {
    "PrometheusRule": (
        "monitoring.coreos.com/v1",
        fields("groups", groups=some(fields("name", name=TEXT, rules=some({"oneOf": [RECORDING, ALERT]})))),
    ),
    "ServiceMonitor": (
        "monitoring.coreos.com/v1",
        fields("endpoints", "selector", selector=fields(matchLabels=TEXTS), endpoints=some(ENDPOINT)),
    ),
    "LeaderWorkerSet": (
        "leaderworkerset.x-k8s.io/v1",
        fields("leaderWorkerTemplate", replicas={"type": "integer", "minimum": 1}, leaderWorkerTemplate=GROUP),
    ),
}


def validate(document: dict[str, Any]) -> None:
    """Raise an exception where a document of any kind is not what Kubernetes takes."""
    if document["kind"] not in KINDS:
        kubernetes_validate.validate(document, VERSION, strict=True)
        return
    version, spec = KINDS[document["kind"]]
    metadata = fields("name", name=TEXT, namespace=TEXT, labels=TEXTS)
    jsonschema.validate(
        document,
        fields("metadata", "spec", apiVersion={"const": version}, kind=TEXT, metadata=metadata, spec=spec),
    )
    group = document["spec"].get("leaderWorkerTemplate", {})
    for template in (group[name] for name in ("leaderTemplate", "workerTemplate") if name in group):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template}
        kubernetes_validate.validate(pod, VERSION, strict=True)
