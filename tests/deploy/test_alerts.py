"""Prometheus's own tool accepts the rules, and says of every alert when it fires and when it does not."""

import re
import subprocess
from dataclasses import dataclass, field

import pytest
import yaml

from tests.deploy.rules import ALERTS, GROUPS, PROMETHEUS, RECORDED, ROOT, RULE_FILES
from tests.programs import needs

GATEWAY = 'job="aot-gateway", instance="gateway:8080"'
ENGINE = 'job="aot-engine", instance="engine:8000"'
CHATS = f'aot_gateway_requests_total{{{GATEWAY}, route="/v1/chat/completions", status_class="%s"}}'
QUEUE_FULL = f'aot_gateway_rejections_total{{{GATEWAY}, reason="queue_full"}}'
FETCH_FAILED = f'aot_gateway_rejections_total{{{GATEWAY}, reason="media_fetch"}}'
FETCHED = f'aot_gateway_overhead_seconds_count{{{GATEWAY}, phase="fetch"}}'
QUEUED = f'aot_gateway_overhead_seconds_bucket{{{GATEWAY}, phase="queue", le="%s"}}'
FIRST_TOKEN = f"aot_gateway_time_to_first_token_seconds_%s{{{GATEWAY}%s}}"
IN_TIME, STREAMS = FIRST_TOKEN % ("bucket", ', le="4.0"'), FIRST_TOKEN % ("count", "")
TOKENS = f'aot_gateway_video_tokens_total{{{GATEWAY}, model="fast", stage="%s"}}'
LIMIT = f'aot_gateway_video_retention_limit_ratio{{{GATEWAY}, model="fast"}}'
VIDEOS = f"aot_gateway_video_duration_seconds_count{{{GATEWAY}}}"


@dataclass
class Case:
    """What Prometheus sees, a value an interval, and the labels of the alert; `silent` is what it must not fire at."""

    firing: dict
    silent: list[dict]
    after: str = "30m"
    interval: str = "1m"
    labels: dict = field(default_factory=dict)


def steady(growth):
    """Return a counter that grows by so much an interval, for long enough."""
    return f"0+{growth}x400"


def chats(*, fine, broken=0, turned_away=0):
    return {
        CHATS % "2xx": steady(fine),
        CHATS % "5xx": steady(broken),
        QUEUE_FULL: steady(turned_away),
    }


def streams(*, in_time, late):
    return {IN_TIME: steady(in_time), STREAMS: steady(in_time + late)}


def one(series, value):
    return {series: f"{value}x60"}


JOB_AND_INSTANCE = {"job": "aot-gateway", "instance": "gateway:8080"}
ENGINE_JOB = {"job": "aot-engine", "instance": "engine:8000"}
UP, DOWN = (
    f'aot_gateway_engine_up{{{GATEWAY}, engine="engine-0"}}',
    f'aot_gateway_engine_up{{{GATEWAY}, engine="engine-1"}}',
)
BREAKER = f'aot_gateway_engine_breaker_open{{{GATEWAY}, engine="engine-0"}}'
CHECK = f'aot_gateway_engine_check{{{GATEWAY}, engine="engine-0", check="request_kwargs"}}'
MISCONFIGURED = f'aot_gateway_rejections_total{{{GATEWAY}, reason="misconfigured"}}'
ACCEPTED = f"aot_gateway_config_last_reload_successful{{{GATEWAY}}}"
IN_USE = 'aot_gateway_config_info{job="aot-gateway", instance="gateway-%d:8080", sha256="%s"}'
BACKEND = f"aot_gateway_limits_backend_up{{{GATEWAY}}}"
UNSAVED = f"aot_gateway_usage_unsaved_requests{{{GATEWAY}}}"
KV = f'vllm:kv_cache_usage_perc{{{ENGINE}, model_name="tiny"}}'
PLUGIN = f"aot_engine_reductions_total{{{ENGINE}}}"
SCRAPED = f"up{{{ENGINE}}}"

CASES = {
    "AOTGatewayDown": Case(one(f"up{{{GATEWAY}}}", 0), [one(f"up{{{GATEWAY}}}", 1)], labels=JOB_AND_INSTANCE),
    "AOTNoEngine": Case(one(UP, 0) | one(DOWN, 0), [one(UP, 1) | one(DOWN, 0)], labels={"instance": "gateway:8080"}),
    "AOTEngineDown": Case(
        one(UP, 0) | one(DOWN, 1),
        [one(UP, 1), {UP: "1 0 1x58"}],
        labels=JOB_AND_INSTANCE | {"engine": "engine-0"},
    ),
    "AOTEngineBreakerOpen": Case(
        one(BREAKER, 1), [one(BREAKER, 0), {BREAKER: "0x28 1 0 0"}], labels=JOB_AND_INSTANCE | {"engine": "engine-0"}
    ),
    "AOTMisconfigured": Case(
        {MISCONFIGURED: "0x27 0+1x60"}, [one(MISCONFIGURED, 7)], labels={"instance": "gateway:8080"}
    ),
    "AOTEngineCheckFailed": Case(
        one(CHECK, 0),
        [one(CHECK, 1), {CHECK: "1x28 0 1x30"}],
        labels=JOB_AND_INSTANCE | {"engine": "engine-0", "check": "request_kwargs"},
    ),
    "AOTEngineNotScraped": Case(one(SCRAPED, 0), [one(SCRAPED, 1)], labels=ENGINE_JOB),
    "AOTConfigurationRefused": Case(
        one(ACCEPTED, 0), [one(ACCEPTED, 1), {ACCEPTED: "1x29 0 1x30"}], labels=JOB_AND_INSTANCE
    ),
    "AOTConfigurationDiffers": Case(
        one(IN_USE % (0, "aa"), 1) | one(IN_USE % (1, "bb"), 1),
        [
            one(IN_USE % (0, "aa"), 1) | one(IN_USE % (1, "aa"), 1),
            {IN_USE % (0, "aa"): "1x28 stale", IN_USE % (0, "bb"): "_x28 1x30", IN_USE % (1, "bb"): "1x60"},
        ],
        labels={"job": "aot-gateway"},
    ),
    "AOTLimitsBackendDown": Case(one(BACKEND, 0), [one(BACKEND, 1)], labels=JOB_AND_INSTANCE),
    "AOTUsageNotSaved": Case(one(UNSAVED, 3), [one(UNSAVED, 0), {UNSAVED: "0x24 7x4 0x20"}], labels=JOB_AND_INSTANCE),
    "AOTAvailabilityBurnFast": Case(
        chats(fine=90, broken=10),
        [
            chats(fine=99, broken=1),  # slow is enough for these
            chats(fine=0.1, broken=0.1),  # a quiet hour
        ],
    ),
    "AOTAvailabilityBurnSlow": Case(
        chats(fine=97, broken=1, turned_away=1),  # a request turned away is a failure too
        [chats(fine=999, broken=1)],
        after="2d",
        interval="30m",
    ),
    "AOTFirstTokenBurnFast": Case(
        streams(in_time=20, late=80), [streams(in_time=90, late=10), streams(in_time=0, late=0.1)]
    ),
    "AOTFirstTokenBurnSlow": Case(
        streams(in_time=90, late=10), [streams(in_time=97, late=3)], after="2d", interval="30m"
    ),
    "AOTQueueFull": Case({QUEUE_FULL: steady(1)}, [one(QUEUE_FULL, 7)], labels={"instance": "gateway:8080"}),
    "AOTQueueWait": Case(
        {QUEUED % "5.0": steady(80), QUEUED % "10.0": steady(100), QUEUED % "+Inf": steady(100)},
        [{QUEUED % "5.0": steady(99), QUEUED % "10.0": steady(100), QUEUED % "+Inf": steady(100)}],
        labels={"instance": "gateway:8080"},
    ),
    "AOTKVCachePressure": Case(one(KV, 0.99), [one(KV, 0.9)], labels=ENGINE_JOB | {"model_name": "tiny"}),
    "AOTFetchFailures": Case(
        {FETCH_FAILED: steady(3), FETCHED: steady(10)},
        [{FETCH_FAILED: steady(1), FETCHED: steady(10)}, {FETCH_FAILED: steady(0.1), FETCHED: steady(0.2)}],
    ),
    "AOTRetentionAboveLimit": Case(
        {TOKENS % "before": steady(1000), TOKENS % "after": steady(990)} | one(LIMIT, 0.5),
        [
            {TOKENS % "before": steady(1000), TOKENS % "after": steady(500)} | one(LIMIT, 0.5),
            {TOKENS % "before": steady(1000), TOKENS % "after": steady(1000)} | one(LIMIT, 1),
        ],
        after="50m",
        labels={"model": "fast"},
    ),
    "AOTSavingsNotReported": Case(
        {VIDEOS: steady(10)} | chats(fine=10),
        [
            {VIDEOS: steady(10), TOKENS % "before": steady(1000)} | chats(fine=10),
            {VIDEOS: steady(10)} | chats(fine=0, broken=10),  # no engine served them
            one(VIDEOS, 10) | chats(fine=10),  # text only
        ],
        after="50m",
    ),
    "AOTPluginMissing": Case(one(SCRAPED, 1), [one(SCRAPED, 1) | one(PLUGIN, 0), one(SCRAPED, 0)], labels=ENGINE_JOB),
}


BURNS = {
    ("1h", "5m"): (14.4, "Fast"),
    ("6h", "30m"): (6, "Fast"),
    ("1d", "2h"): (3, "Slow"),
    ("3d", "6h"): (1, "Slow"),
}
"""How many times faster than allowed the budget burns over both windows, and the alert that says so."""
OBJECTIVES = {
    "Availability": ("aot:requests_failed:ratio_rate", 0.005, CHATS % "2xx"),
    "FirstToken": ("aot:first_token_late:ratio_rate", 0.05, STREAMS),
}
"""What is recorded, the share that is allowed, and what counts as traffic."""
WINDOWS = {window for pair in BURNS for window in pair}


def promtool(*arguments):
    return subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=120, cwd=PROMETHEUS)


def promtool_tests(path, tests, *, rule_files=RULE_FILES, interval="1m"):
    """Have promtool run test groups from a file at `path`."""
    suite = {
        "rule_files": [str(file) for file in rule_files],
        "evaluation_interval": interval,
        # what is recorded would be stale at the next of these long intervals
        "group_eval_order": [name for name in GROUPS if any(f"name: {name}\n" in f.read_text() for f in rule_files)],
        "tests": tests,
    }
    path.write_text(yaml.safe_dump(suite))
    tested = promtool("test", "rules", str(path))
    assert tested.returncode == 0, tested.stdout + tested.stderr


def rendered(annotations, labels):
    """Return annotations as Prometheus fills them in."""
    return {
        name: re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda match: labels.get(match[1], ""), text)
        for name, text in annotations.items()
    }


def scenario(name, series, *, fires, labels=None, after, interval="1m"):
    """Return one of promtool's test groups: what it sees, and whether the alert fires `after` so long."""
    alert, labels = ALERTS[name], labels or {}
    expected = {
        "exp_labels": labels | alert["labels"],
        "exp_annotations": rendered(alert["annotations"], labels),
    }
    return {
        "interval": interval,
        "input_series": [{"series": series, "values": values} for series, values in series.items()],
        "alert_rule_test": [{"alertname": name, "eval_time": after, "exp_alerts": [expected] if fires else []}],
    }


@needs("promtool")
def test_the_configuration_and_its_rules_are_valid():
    checked = promtool("check", "config", "prometheus.yml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    rules = promtool("check", "rules", *map(str, RULE_FILES))
    assert rules.returncode == 0, rules.stdout + rules.stderr


@needs("promtool")
@pytest.mark.parametrize("name", sorted(CASES))
def test_an_alert_fires_when_it_should_and_only_then(tmp_path, name):
    case = CASES[name]
    when = {"after": case.after, "interval": case.interval}
    tests = [
        scenario(name, case.firing, fires=True, labels=case.labels, **when),
        *(scenario(name, series, fires=False, **when) for series in case.silent),
    ]
    if name == "AOTGatewayDown":  # also one that Prometheus has never heard of
        tests.append(scenario(name, {}, fires=True, labels={"job": "aot-gateway"}, **when))
    promtool_tests(tmp_path / "test.yml", tests, interval=case.interval)


@needs("promtool")
@pytest.mark.parametrize("pair", BURNS, ids=" and ".join)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_each_pair_of_windows_fires_by_itself_and_neither_window_without_the_other(tmp_path, objective, pair):
    recorded, allowed, traffic = OBJECTIVES[objective]
    factor, pace = BURNS[pair]

    def burning(*windows):
        share = {window: factor * allowed * (1.05 if window in windows else 0.95) for window in pair}
        return {traffic: steady(9)} | {f"{recorded}{window}": f"{share.get(window, 0)}x90" for window in WINDOWS}

    alert = f"AOT{objective}Burn{pace}"
    tests = [
        scenario(alert, burning(*pair), fires=True, after="80m"),
        *(scenario(alert, burning(window), fires=False, after="80m") for window in pair),
    ]
    alone = [path for path in RULE_FILES if path.name == "alerts.yml"]  # what is recorded is given
    promtool_tests(tmp_path / "test.yml", tests, rule_files=alone)


@pytest.mark.parametrize("window", sorted(WINDOWS))
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_is_recorded_over_a_window_is_the_same_over_every_other(objective, window):
    recorded = OBJECTIVES[objective][0]
    assert RECORDED[f"{recorded}{window}"] == RECORDED[f"{recorded}5m"].replace("[5m]", f"[{window}]")


def test_every_alert_has_its_cases():
    assert CASES.keys() == ALERTS.keys()
    assert all(case.silent for case in CASES.values())


def test_every_alert_has_a_runbook():
    headings = re.findall(r"^#+ (.+)$", (ROOT / "docs" / "operate.md").read_text(encoding="utf-8"), re.MULTILINE)
    anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    for name, alert in ALERTS.items():
        assert alert["annotations"]["runbook_url"] == f"docs/operate.md#{name.lower()}"
        assert anchors.count(name.lower()) == 1, name
        assert alert["labels"]["severity"] in ("critical", "warning")
