"""Write the dashboards beside this file as Grafana reads them: `python -m deploy.grafana.generate`."""

import json
from dataclasses import dataclass
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import BigValueGraphMode, DataSourceRef, LegendDisplayMode, LegendPlacement
from grafana_foundation_sdk.models.dashboard import (
    Dashboard,
    DashboardCursorSync,
    DashboardLinkType,
    VariableOption,
    VariableRefresh,
)

FOLDER = Path(__file__).parent / "dashboards"
SOURCE = DataSourceRef(type_val="prometheus", uid="prometheus")
TAG = "aot"

G, E = "aot_gateway_", "aot_engine_"
MODEL, INSTANCE = '{model=~"$model"}', '{instance=~"$engine"}'


@dataclass(frozen=True)
class Panel:
    """One panel: its queries by the names of their lines, Grafana's unit, and its width in columns, of 24."""

    title: str
    unit: str
    description: str
    queries: dict[str, str]
    width: int = 12
    is_number: bool = False
    """One big number, not lines over time."""

    def build(self) -> "timeseries.Panel | stat.Panel":
        """Return Grafana's."""
        if self.is_number:
            panel = stat.Panel().graph_mode(BigValueGraphMode.AREA).height(4)
        else:
            legend = common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
            panel = timeseries.Panel().legend(legend.show_legend(True)).fill_opacity(8).min(0).height(8)
        panel.title(self.title).unit(self.unit).description(self.description).datasource(SOURCE).span(self.width)
        for number, (name, expression) in enumerate(self.queries.items()):
            query = prometheus.Dataquery().expr(expression).legend_format(name).ref_id(chr(ord("A") + number))
            panel.with_target(query.datasource(SOURCE).range())
        return panel


def number(title: str, unit: str, description: str, query: str, *, width: int = 6) -> Panel:
    """Return a panel with one big number."""
    return Panel(title, unit, description, {title: query}, width, is_number=True)


def chosen(name: str, label: str, query: str) -> dashboard.QueryVariable:
    """Return a variable that takes any of the values Prometheus has for a label."""
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(VariableOption(text="All", value="$__all"))
    )


def per_model(title: str) -> dashboard.Dashboard:
    return _dashboard(title).with_variable(chosen("model", "Model", f"label_values({G}requests_total, model)"))


def _dashboard(title: str) -> dashboard.Dashboard:
    to_the_others = dashboard.DashboardLink("Dashboards").type(DashboardLinkType.DASHBOARDS).tags([TAG]).keep_time(True)
    return (
        dashboard.Dashboard(f"AOT: {title}")
        .uid("aot-" + title.lower().replace(" ", "-"))
        .tags([TAG])
        .time("now-6h", "now")
        .refresh("30s")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .readonly()
        .link(to_the_others)
    )


def rate(metric: str, labels: str = "", *, by: str = "") -> str:
    total = f"sum by ({by})" if by else "sum"
    return f"{total} (rate({metric}{labels}[$__rate_interval]))"


def quantile(share: float, histogram: str, labels: str = "", *, by: str = "") -> str:
    labels_kept = f"{by}, le" if by else "le"
    return f"histogram_quantile({share}, {rate(histogram + '_bucket', labels, by=labels_kept)})"


def tokens(stage: str) -> str:
    """Return the labels of video tokens at a stage."""
    return f'{{model=~"$model", stage="{stage}"}}'


def saved_over(window: str) -> str:
    counted = f"{G}video_tokens_total"
    before, after = (f"sum(increase({counted}{tokens(stage)}[{window}]))" for stage in ("before", "after"))
    return f"({before} - {after})"


def prefill(stage: str, window: str) -> str:
    """Return the time of prefill at a stage over a window."""
    return f"sum(increase({G}prefill_seconds_total{tokens(stage)}[{window}]))"


PREFILL_SAVED = f"({prefill('before', '$__range')} - {prefill('after', '$__range')})"
MEASURED = (
    "By what each engine measured of its own prefill when it started, one prompt at a time. Reductions are subtracted. "
    "The vision tower and what the prefix cache had are not counted: they save nothing."
)


def savings() -> Dashboard:
    """The dashboard of savings."""
    before, after = (rate(f"{G}video_tokens_total", tokens(stage)) for stage in ("before", "after"))
    by_model = [rate(f"{G}video_tokens_total", tokens(stage), by="model") for stage in ("before", "after")]
    price = (
        dashboard.TextBoxVariable("price")
        .label("Price of an engine hour")
        .default_value("2.00")
        .current(VariableOption(text="2.00", value="2.00"))
    )
    of_tenants = f"{G}tenant_usage_total"
    in_range = f"sum(increase({G}video_tokens_total{tokens('before')}[$__range]))"
    return _with(
        per_model("Savings").with_variable(price),
        number(
            "Saved",
            "percentunit",
            "Share of video tokens that engines did not have to process.",
            f"{saved_over('$__range')} / {in_range}",
        ),
        number(
            "Tokens saved",
            "short",
            "Video tokens before less those after, as the engines count them.",
            saved_over("$__range"),
        ),
        number("Prefill time saved", "s", "Time that engines did not spend on prefill. " + MEASURED, PREFILL_SAVED),
        number(
            "Worth of the prefill saved",
            "currencyUSD",
            "Prefill time saved at the price of an engine hour above, all its GPUs together. " + MEASURED,
            f"{PREFILL_SAVED} / 3600 * $price",
        ),
        Panel(
            "Video tokens",
            "short",
            "Video tokens a second before and after reduction.",
            {"before": before, "after": after},
        ),
        Panel(
            "Prefill of requests with videos",
            "s",
            "Time of prefill a second, without and with the reduction. " + MEASURED,
            {stage: rate(f"{G}prefill_seconds_total", tokens(stage)) for stage in ("before", "after")},
        ),
        Panel(
            "Tokens saved by tenant",
            "short",
            "Video tokens saved a second.",
            {"{{tenant}}": rate(of_tenants, '{unit="video_tokens_saved"}', by="tenant")},
        ),
        Panel(
            "Saved by tenant",
            "percentunit",
            "Share of each tenant's video tokens that was saved.",
            {
                "{{tenant}}": " / ".join(
                    rate(of_tenants, f'{{unit="video_tokens_{unit}"}}', by="tenant") for unit in ("saved", "before")
                )
            },
        ),
        Panel(
            "Saved by model",
            "percentunit",
            "Share of video tokens saved, by the model as clients name it.",
            {"{{model}}": f"1 - {by_model[1]} / {by_model[0]}"},
        ),
        Panel(
            "Retention of requests",
            "percentunit",
            "Share of its video tokens that a request kept: median, and 95%.",
            {
                f"{share:.0%} of {{{{model}}}}": quantile(share, f"{G}video_retention_ratio", MODEL, by="model")
                for share in (0.5, 0.95)
            },
        ),
        Panel(
            "Retention and what is allowed",
            "percentunit",
            "Share kept over half an hour, and the most that the configuration file allows a request.",
            {
                "{{model}} kept": f"aot:video_retention:ratio_rate30m{MODEL}",
                "{{model}} may keep": f"max by (model) ({G}video_retention_limit_ratio{MODEL})",
            },
        ),
        Panel(
            "Videos reduced",
            "ops",
            "Videos a second: shortened in answers, and reduced anew in a worker. The difference came from caches.",
            {"shortened": rate(f"{E}videos_reduced_total"), "reduced in a worker": rate(f"{E}reductions_total")},
        ),
        Panel(
            "Cost of a reduction",
            "s",
            "Time the worker spends to choose and merge a video's tokens.",
            {"seconds a video": f"{rate(f'{E}reduction_seconds_total')} / {rate(f'{E}reductions_total')}"},
        ),
        Panel(
            "Vision tower and reductions",
            "s",
            "Time a second that workers spend on the tower, for videos whole or reduced, and on reductions.",
            {stage: rate(f"{E}{stage}_seconds_total") for stage in ("tower", "reduction")},
        ),
    )


def latency() -> Dashboard:
    """How long clients wait, and for what."""
    first, gap = f"{G}time_to_first_token_seconds", f"{G}inter_token_latency_seconds"
    request, overhead = f"{G}request_duration_seconds", f"{G}overhead_seconds"
    shares = {"50%": 0.5, "95%": 0.95, "99%": 0.99}
    return _with(
        per_model("Latency"),
        Panel(
            "Time to first token",
            "s",
            "Streams: from the request's first byte to the first token.",
            {name: quantile(share, first, MODEL) for name, share in shares.items()},
        ),
        Panel(
            "Time to first token by model",
            "s",
            "95% of a model's streams begin within this time.",
            {"{{model}}": quantile(0.95, first, MODEL, by="model")},
        ),
        Panel(
            "Gap between tokens",
            "s",
            "Streams: from one chunk to the next after the first.",
            {name: quantile(share, gap, MODEL) for name, share in shares.items()},
        ),
        Panel(
            "Duration of requests",
            "s",
            "95% of generating requests end within this time.",
            {"{{route}}, stream {{stream}}": quantile(0.95, request, '{route=~"/v1/.*"}', by="route, stream")},
        ),
        Panel(
            "Where the gateway's time goes",
            "s",
            "Mean time of the requests that went through a phase.",
            {"{{phase}}": f"{rate(f'{overhead}_sum', by='phase')} / {rate(f'{overhead}_count', by='phase')}"},
        ),
        Panel(
            "Where the gateway's time goes at worst",
            "s",
            "95% of requests take at most this long in a phase.",
            {"{{phase}}": quantile(0.95, overhead, by="phase")},
        ),
        Panel(
            "Where the engine's time goes",
            "s",
            "Mean time of a request in the engine: queue, prefill, decode.",
            {
                stage: f"{rate(f'vllm:request_{stage}_time_seconds_sum')} / "
                f"{rate(f'vllm:request_{stage}_time_seconds_count')}"
                for stage in ("queue", "prefill", "decode")
            },
        ),
        Panel(
            "First tokens later than the objective",
            "percentunit",
            "Share of streams whose first token came after more than 4 seconds; the objective is 5%.",
            {"5 minutes": "aot:first_token_late:ratio_rate5m", "1 hour": "aot:first_token_late:ratio_rate1h"},
        ),
    )


def engines() -> Dashboard:
    """How the engines are."""
    hits = {"prefix": "vllm:prefix_cache", "media": "vllm:mm_cache"}
    return _with(
        _dashboard("Engines").with_variable(chosen("engine", "Engine", 'label_values(up{job="aot-engine"}, instance)')),
        Panel(
            "Up",
            "bool_on_off",
            "Engines as the gateways see them: 1 if the last health check passed.",
            {"{{engine}} of {{instance}}": f"{G}engine_up"},
        ),
        Panel(
            "Breaker",
            "bool_on_off",
            "1 while an engine gets no requests, or one on trial, because it failed.",
            {"{{engine}} of {{instance}}": f"{G}engine_breaker_open"},
        ),
        Panel(
            "Set-up",
            "bool_on_off",
            "0 if an engine is not set up for what the gateways ask of it; docs/operate.md explains each check.",
            {"{{engine}}: {{check}}": f"min by (engine, check) ({G}engine_check)"},
        ),
        Panel(
            "Affinity",
            "reqps",
            "Requests that went to the engine of their media (hit), to another because that one "
            "was busy (spilled), or by load (none).",
            {"{{outcome}}": rate(f"{G}affinity_total", by="outcome")},
        ),
        Panel(
            "Sent once more",
            "reqps",
            "Requests sent again: to another engine, by what the first one did, or to the same one (cache_miss).",
            {"{{reason}}": rate(f"{G}upstream_retries_total", by="reason")},
        ),
        Panel(
            "Cache hits",
            "percentunit",
            "Share of prompt tokens found in the prefix cache, and of media in the processor's cache.",
            {
                f"{name}, {{{{instance}}}}": f"{rate(f'{cache}_hits_total', INSTANCE, by='instance')} / "
                f"{rate(f'{cache}_queries_total', INSTANCE, by='instance')}"
                for name, cache in hits.items()
            },
        ),
        Panel(
            "KV cache",
            "percentunit",
            "Share of the KV cache in use; full, requests wait or are preempted.",
            {"{{instance}}": f"vllm:kv_cache_usage_perc{INSTANCE}"},
        ),
        Panel(
            "Requests in the engine",
            "short",
            "Running, and waiting for a place in the batch.",
            {f"{state}, {{{{instance}}}}": f"vllm:num_requests_{state}{INSTANCE}" for state in ("running", "waiting")},
        ),
        Panel(
            "Preemptions",
            "ops",
            "Requests a second that lost their place for want of KV cache and start again.",
            {"{{instance}}": rate("vllm:num_preemptions_total", INSTANCE, by="instance")},
        ),
        Panel(
            "Tokens",
            "short",
            "Tokens a second: prompts after reduction, and answers.",
            {
                f"{kind}, {{{{instance}}}}": rate(f"vllm:{kind}_tokens_total", INSTANCE, by="instance")
                for kind in ("prompt", "generation")
            },
        ),
        Panel(
            "Unconverged solves",
            "ops",
            "Transport problems a second that ended at the iteration limit.",
            {"{{instance}}": rate(f"{E}unconverged_solves_total", INSTANCE, by="instance")},
        ),
    )


def traffic() -> Dashboard:
    """The dashboard of traffic and errors."""
    requests = f"{G}requests_total"
    served = '{route=~"/v1/.*", model=~"$model"}'
    return _with(
        per_model("Traffic and errors"),
        Panel(
            "Requests",
            "reqps",
            "Requests to the API, by class of status.",
            {"{{status_class}}": rate(requests, served, by="status_class")},
        ),
        Panel(
            "Requests by model",
            "reqps",
            "Requests to the API; `none` ended before it named a model, `other` named one that does not exist.",
            {"{{model}}": rate(requests, served, by="model")},
        ),
        Panel(
            "Errors by reason",
            "reqps",
            "Requests that ended in an error; docs/gateway.md lists the reasons' errors.",
            {"{{reason}}": rate(f"{G}rejections_total", by="reason")},
        ),
        Panel(
            "Failures and the objective",
            "percentunit",
            "Share of requests that the gateway or an engine failed, or that found no room; the objective is 0.5%.",
            {"5 minutes": "aot:requests_failed:ratio_rate5m", "1 hour": "aot:requests_failed:ratio_rate1h"},
        ),
        Panel(
            "Inside the gateway",
            "short",
            "Generating requests, and those of them waiting for an engine.",
            {"inside": f"sum({G}inflight_requests)", "waiting": f"sum({G}queue_depth)"},
        ),
        Panel(
            "Memory of requests",
            "bytes",
            "Bodies and media fetched for them; beyond AOT_GATEWAY_MAX_BUFFERED_BYTES requests get a 429.",
            {"{{instance}}": f"{G}buffered_bytes"},
        ),
        Panel(
            "Use by tenant",
            "short",
            "What tenants use a second: requests, tokens, seconds of video; and requests refused for their limits.",
            {"{{tenant}}, {{unit}}": rate(f"{G}tenant_usage_total", '{unit!~"video_tokens_.*"}', by="tenant, unit")},
        ),
        Panel(
            "Size of videos",
            "bytes",
            "Of the videos taken in: median, and 95%.",
            {name: quantile(share, f"{G}video_bytes") for name, share in (("50%", 0.5), ("95%", 0.95))},
        ),
        Panel(
            "Duration of videos",
            "s",
            "Of the videos taken in: median, and 95%.",
            {name: quantile(share, f"{G}video_duration_seconds") for name, share in (("50%", 0.5), ("95%", 0.95))},
        ),
        Panel(
            "Media looked into",
            "ops",
            "Media that a process opened to check them; those seen before are not.",
            {"probes": rate(f"{G}probes_total")},
        ),
        Panel(
            "Limits shared",
            "bool_on_off",
            "0 while gateways count limits each by itself because Redis is out of reach.",
            {"{{instance}}": f"{G}limits_backend_up"},
        ),
        Panel(
            "Usage waiting for Redis",
            "short",
            "Answered requests whose usage is not saved yet, because Redis is out of reach.",
            {"{{instance}}": f"{G}usage_unsaved_requests"},
        ),
        Panel(
            "Configurations in use",
            "short",
            "Gateways by the configuration file that they serve: the first digits of its sha256sum. Differing ones are "
            "an alert after five minutes, and so is a changed file that is refused.",
            {"{{sha256}}": f"count by (sha256) ({G}config_info)"},
        ),
        Panel(
            "Age of the configuration in use",
            "s",
            "Since the gateway last read its configuration file and accepted it.",
            {"{{instance}}": f"time() - {G}config_last_reload_success_timestamp_seconds"},
        ),
        Panel(
            "Versions", "short", "Gateways running, by version.", {"{{version}}": f"count by (version) ({G}build_info)"}
        ),
    )


def _with(board: dashboard.Dashboard, *panels: Panel) -> Dashboard:
    for number_of_panel, panel in enumerate(panels, start=1):
        board.with_panel(panel.build().id(number_of_panel))
    return board.build()


def dashboards() -> dict[str, str]:
    """Return the JSON of every dashboard by the name of its file."""
    boards = (savings(), latency(), engines(), traffic())
    return {f"{board.uid}.json": json.dumps(board, cls=JSONEncoder, indent=2) + "\n" for board in boards}


def main() -> None:
    """Write them all."""
    FOLDER.mkdir(exist_ok=True)
    for name, content in dashboards().items():
        (FOLDER / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
