"""OpenTelemetry spans: one for each API request, with child spans for its phases and for its engines.

This module is imported only if an exporter is configured. The SDK reads all other settings, sampling included, from
its own OTEL_* variables.
"""

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
from typing import Any, Final, Self

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.propagate import extract, inject
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context

from server import __version__
from server.observe.record import NO_MODEL, OTHER, RequestRecord

OPERATIONS: Final = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
}


LAST_EXPORT_SECONDS: Final = 2.0


class Tracing:
    """Creates spans, and exports them in a background thread."""

    def __init__(self, exporter: SpanExporter) -> None:
        """Export to `exporter`. Sampling and resource attributes come from the OTEL_* variables."""
        self._exporter = exporter
        named = Resource({SERVICE_NAME: "aot-gateway"}).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=Resource.create().merge(named), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("aot-gateway", __version__)

    @classmethod
    def over_otlp(cls) -> Self:
        """Return a Tracing that exports over OTLP to the endpoint in the OTEL_* variables."""
        return cls(OTLPSpanExporter())

    async def close(self) -> None:
        """Export the remaining spans, within LAST_EXPORT_SECONDS if the collector does not answer."""
        exporting = asyncio.create_task(asyncio.to_thread(self._provider.shutdown))
        _, late = await asyncio.wait({exporting}, timeout=LAST_EXPORT_SECONDS)
        if late:
            self._exporter.shutdown()
        await exporting

    def begin(self, headers: Mapping[str, str], method: str) -> "RequestTrace":
        """Return the trace of a new request. It continues the client's trace if `headers` carry one."""
        span = self._tracer.start_span("request", context=extract(headers), kind=SpanKind.SERVER)
        span.set_attribute("http.request.method", method)
        return RequestTrace(self._tracer, span)


class RequestTrace:
    """The spans of one request. Times are perf_counter seconds."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        """Add all further spans as children of `span`."""
        self._tracer = tracer
        self._span = span
        self._context = set_span_in_context(span)
        self._epoch = time.time() - perf_counter()

    def phase(self, name: str, begin: float, end: float) -> None:
        """Add a span for one phase of the gateway's own work."""
        if self._span.is_recording():
            span = self._tracer.start_span(name, context=self._context, start_time=self._nanoseconds(begin))
            span.end(end_time=self._nanoseconds(end))

    @contextmanager
    def engine(self, name: str) -> Iterator[dict[str, str]]:
        """Hold a span open while an engine has the request; yield the headers that continue the trace there."""
        span = self._tracer.start_span("engine", context=self._context, kind=SpanKind.CLIENT)
        span.set_attribute("aot.engine", name)
        carrier: dict[str, str] = {}
        inject(carrier, context=set_span_in_context(span))
        try:
            yield carrier
        finally:
            span.end()

    def end(self, record: RequestRecord, *, tenant: str) -> None:
        """Close the request's span, with the attributes that are known at its end."""
        operation = OPERATIONS.get(record.route)
        attributes: dict[str, Any] = {
            "http.route": record.route,
            "http.response.status_code": record.status,
            "error.type": record.reason,
            "aot.request_id": record.request_id,
            "aot.tenant": tenant or None,
            "gen_ai.operation.name": operation,
        }
        if operation is not None:
            known = record.model not in (NO_MODEL, OTHER)
            attributes |= {
                "gen_ai.provider.name": "vllm",
                "gen_ai.request.model": record.model if known else None,
                "gen_ai.request.stream": record.stream,
                "gen_ai.response.model": record.engine_model,
                "gen_ai.response.time_to_first_chunk": record.seconds_to_first_token,
                "gen_ai.usage.input_tokens": record.prompt_tokens,
                "gen_ai.usage.output_tokens": record.answer_tokens,
            }
            self._span.update_name(f"{operation} {record.model}" if known else operation)
        else:
            self._span.update_name(record.route)
        if record.video_tokens is not None:
            before, after = record.video_tokens
            attributes |= {
                "aot.video_tokens.before": before,
                "aot.video_tokens.after": after,
                "aot.video_retention": record.retention,
            }
        self._span.set_attributes({name: value for name, value in attributes.items() if value is not None})
        if record.status >= 500:
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()

    def _nanoseconds(self, moment: float) -> int:
        return int((self._epoch + moment) * 1e9)
