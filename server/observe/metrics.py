"""Every metric of the gateway, once, on a registry that is handed in."""

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from server import __version__
from server.errors import REASONS

PREFIX: Final = "aot_gateway_"
NO_MODEL: Final = "none"  # the request ended before it named one
NO_TENANT: Final = "none"  # the gateway is open
OTHER: Final = "other"  # it named one that does not exist

_FAST = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_TTFT = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 7.5, 10, 15, 20, 30, 45, 60, 90, 120)
_ITL = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10)
_REQUEST = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600)
_RATIO = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_BYTES = tuple(float(2**exponent) for exponent in range(14, 31, 2))
_SECONDS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200)


class Metrics:
    """The gateway's metrics. Labels come from closed sets: routes, reasons, engine numbers, what is configured."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Register everything on `registry`."""
        self.registry = registry

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(PREFIX + name, text, labels, buckets=buckets, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(PREFIX + name, text, labels, registry=registry)

        self.requests = counter(
            "requests_total",
            "Requests answered; a stream that broke counts as 5xx, a client that left as 4xx",
            *("route", "model", "status_class", "stream"),
        )
        self.request_duration = histogram(
            "request_duration_seconds",
            "From the request's first byte to the answer's last",
            _REQUEST,
            "route",
            "stream",
        )
        self.time_to_first_token = histogram(
            "time_to_first_token_seconds", "Streams: from the request's first byte to the first token", _TTFT, "model"
        )
        self.inter_token_latency = histogram(
            "inter_token_latency_seconds", "Streams: gap between two chunks after the first token", _ITL, "model"
        )
        self.overhead = histogram("overhead_seconds", "Time the gateway itself took, by what it did", _FAST, "phase")
        self.video_tokens = counter(
            "video_tokens_total", "Video tokens before and after reduction, as engines count them", "model", "stage"
        )
        self.video_retention = histogram(
            "video_retention_ratio", "Share of video tokens kept, by request, as engines count it", _RATIO, "model"
        )
        self.retention_limit = gauge(
            "video_retention_limit_ratio", "Largest share of video tokens that a request may keep, by alias", "model"
        )
        self.video_bytes = histogram("video_bytes", "Size of each video taken in", _BYTES)
        self.video_duration = histogram("video_duration_seconds", "Duration of each video taken in", _SECONDS)
        self.probes = counter("probes_total", "Media looked into; those seen before are not looked into again")
        self.rejections = counter("rejections_total", "Requests that ended in an error, by reason", "reason")
        self.tenant_usage = counter(
            "tenant_usage_total", "What tenants used: requests, tokens, video_seconds", "tenant", "unit"
        )
        self.limits_backend_up = gauge(
            "limits_backend_up", "0 while limits are not shared because Redis is out of reach"
        )
        self.upstream_retries = counter(
            "upstream_retries_total", "Requests sent to another engine, by what the first one did", "reason"
        )
        self.engine_up = gauge("engine_up", "1 if the engine's last health check passed", "engine")
        self.engine_breaker_open = gauge(
            "engine_breaker_open", "1 while the engine gets no requests, or one on trial, because it failed", "engine"
        )
        self.affinity = counter(
            "affinity_total", "Requests by whether they went to the engine that their media belong to", "outcome"
        )
        self.inflight_requests = gauge("inflight_requests", "Generating requests inside the gateway")
        self.buffered_bytes = gauge("buffered_bytes", "What requests hold in memory beyond 64 KiB each")
        self.queue_depth = gauge("queue_depth", "Generating requests waiting for an engine")
        for counted, outcomes in (
            (self.rejections, REASONS),
            (self.upstream_retries, ("connect", "refused")),
            (self.affinity, ("hit", "spilled", "none")),
        ):
            for outcome in outcomes:  # a counter that begins with its first event hides that event from rate()
                counted.labels(outcome)
        build = gauge("build_info", "1, labelled with the gateway's version", "version")
        build.labels(__version__).set(1)
