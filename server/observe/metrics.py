"""All metrics of the gateway, registered on an injected registry."""

from collections.abc import Iterable
from functools import cache
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from server import __version__
from server.errors import REASONS
from server.observe.record import RequestRecord

PREFIX: Final = "aot_gateway_"
NO_TENANT: Final = "none"  # the label's value where the gateway needs no keys
TENANT_UNITS: Final = (
    *("requests", "tokens", "video_seconds", "rate_limited"),
    *("video_tokens_before", "video_tokens_after", "video_tokens_saved"),
)
_STAGES: Final = ("before", "after")

_FAST = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_TTFT = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 7.5, 10, 15, 20, 30, 45, 60, 90, 120)
_ITL = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10)
_REQUEST = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600)
# Retentions are hundredths, so that they lie amid these buckets: up to 0.3 a quantile reads them to half a hundredth.
_RATIO = (*(hundredth / 100 + 0.005 for hundredth in range(31)), *(step / 40 for step in range(13, 40, 2)), 1.0)
_BYTES = tuple(float(2**exponent) for exponent in range(14, 31, 2))
_SECONDS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200)


class Metrics:
    """The gateway's metrics.

    Label values come from closed sets only: routes, reasons, engine numbers, known models and configured tenants.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        """Register everything on `registry`."""
        self.registry = registry
        self._declare_requests()
        self._declare_configuration()
        self._declare_videos()
        self._declare_admission()
        self._declare_engines()
        for counted, outcomes in (
            (self.rejections, REASONS),
            (self.upstream_retries, ("connect", "refused", "misconfigured", "cache_miss")),
            (self.affinity, ("hit", "spilled", "none")),
        ):
            for outcome in outcomes:  # every counter starts at 0: without this, rate() would miss its first event
                counted.labels(outcome)

    def know_tenants(self, names: Iterable[str]) -> None:
        """Let the counters of these tenants start at 0."""
        for name in names:
            for unit in TENANT_UNITS:
                self.tenant_usage.labels(name, unit)

    def count(self, record: RequestRecord, seconds: float, *, tenant: str) -> None:
        """Count a request of `tenant` that has ended after `seconds`."""
        status_class, stream = f"{record.status // 100}xx", str(record.stream).lower()
        self.requests.labels(record.route, record.model, status_class, stream).inc()
        self.request_duration.labels(record.route, stream).observe(seconds)
        for phase, spent in record.phases.items():
            self.overhead.labels(phase).observe(spent)
        if record.reason is not None:
            self.rejections.labels(record.reason).inc()
        if record.seconds_to_first_token is not None:
            self.time_to_first_token.labels(record.model).observe(record.seconds_to_first_token)
        if record.video_tokens is not None:
            before, after = record.video_tokens
            for stage, tokens in zip(_STAGES, record.video_tokens, strict=True):
                self.video_tokens.labels(record.model, stage).inc(tokens)
                self.tenant_usage.labels(tenant or NO_TENANT, f"video_tokens_{stage}").inc(tokens)
            self.tenant_usage.labels(tenant or NO_TENANT, "video_tokens_saved").inc(before - after)
            self.video_retention.labels(record.model).observe(record.retention or 0.0)
        for stage, spent in zip(_STAGES, record.prefill_seconds or (), strict=False):
            self.prefill_seconds.labels(record.model, stage).inc(spent)

    def _declare_requests(self) -> None:
        self.requests = self._counter(
            "requests_total",
            "Requests answered; a stream that broke counts as 5xx, a client that left as 4xx",
            *("route", "model", "status_class", "stream"),
        )
        self.request_duration = self._histogram(
            "request_duration_seconds",
            "From the request's first byte to the answer's last",
            _REQUEST,
            "route",
            "stream",
        )
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "Streams: from the request's first byte to the first token", _TTFT, "model"
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Streams: gap between two chunks after the first token", _ITL, "model"
        )
        self.overhead = self._histogram(
            "overhead_seconds", "Time the gateway itself took, by what it did", _FAST, "phase"
        )
        self.rejections = self._counter("rejections_total", "Requests that ended in an error, by reason", "reason")
        build = self._gauge("build_info", "1, labelled with the gateway's version", "version")
        build.labels(__version__).set(1)

    def _declare_configuration(self) -> None:
        self.config_info = self._gauge(
            "config_info", "1, labelled with the first digits of the SHA-256 of the configuration file in use", "sha256"
        )
        self.config_accepted = self._gauge(
            "config_last_reload_successful", "0 while the configuration file is wrong and an earlier one is in use"
        )
        self.config_loaded_at = self._gauge(
            "config_last_reload_success_timestamp_seconds", "When the configuration in use was read"
        )

    def _declare_videos(self) -> None:
        self.video_tokens = self._counter(
            "video_tokens_total", "Video tokens before and after reduction, as engines count them", "model", "stage"
        )
        self.prefill_seconds = self._counter(
            "prefill_seconds_total",
            "Prefill of requests with videos, before and after reduction, by what engines measured of their prefill",
            *("model", "stage"),
        )
        self.video_retention = self._histogram(
            "video_retention_ratio", "Share of video tokens kept, by request, as engines count it", _RATIO, "model"
        )
        self.retention_limit = self._gauge(
            "video_retention_limit_ratio", "Largest share of video tokens that a request may keep, by alias", "model"
        )
        self.video_bytes = self._histogram("video_bytes", "Size of each video taken in", _BYTES)
        self.video_duration = self._histogram("video_duration_seconds", "Duration of each video taken in", _SECONDS)
        self.probes = self._counter("probes_total", "Media probed; facts about known content come from a cache")

    def _declare_admission(self) -> None:
        self.tenant_usage = self._counter(
            "tenant_usage_total",
            "What tenants used and saved, by unit; requests rate_limited are those refused for a limit",
            "tenant",
            "unit",
        )
        self.limits_backend_up = self._gauge(
            "limits_backend_up", "0 while limits are not shared because Redis is out of reach"
        )
        self.usage_unsaved_requests = self._gauge(
            "usage_unsaved_requests", "Answered requests whose usage waits for a Redis that is out of reach"
        )
        self.inflight_requests = self._gauge("inflight_requests", "Generating requests inside the gateway")
        self.buffered_bytes = self._gauge("buffered_bytes", "Bytes that requests hold in memory, beyond 64 KiB each")
        self.queue_depth = self._gauge("queue_depth", "Generating requests waiting for an engine")

    def _declare_engines(self) -> None:
        self.upstream_retries = self._counter(
            "upstream_retries_total", "Requests sent to an engine once more, by what came of the first time", "reason"
        )
        self.engine_up = self._gauge("engine_up", "1 if the engine's last health check passed", "engine")
        self.engine_check = self._gauge(
            "engine_check", "1 if the engine is set up for what the gateway asks of it, by check", "engine", "check"
        )
        self.engine_breaker_open = self._gauge(
            "engine_breaker_open", "1 while the engine gets no requests, or one on trial, because it failed", "engine"
        )
        self.affinity = self._counter(
            "affinity_total", "Requests by whether they went to the engine that their media belong to", "outcome"
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        counter = Counter(PREFIX + name, text, labels, registry=self.registry)
        _remember_children(counter)
        return counter

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        histogram = Histogram(PREFIX + name, text, labels, buckets=buckets, registry=self.registry)
        _remember_children(histogram)
        return histogram

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(PREFIX + name, text, labels, registry=self.registry)


def _remember_children(metric: Any) -> None:
    """Let `labels` return a child that it has returned before without the work that it needs for a new one.

    The children of such a metric are never removed.
    """
    metric.labels = cache(metric.labels)
