import asyncio
import subprocess
import sys

import httpx
import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client import CollectorRegistry

from server.app import create_app
from server.observe.tracing import Tracing
from server.settings import Settings
from tests.server.clips import clip, data_url
from tests.server.harness import CHAT, ROOT, GatewayProcess, ask, ask_about, client_of

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


@pytest.fixture
def spans():
    return InMemorySpanExporter()


@pytest.fixture
async def client(engine, spans):
    tracing = Tracing(spans)
    app = create_app(Settings(engines=(engine.url,)), registry=CollectorRegistry(), tracing=tracing)
    async with app.router.lifespan_context(app), client_of(app) as client:
        client.flush = tracing._provider.force_flush
        yield client


def root_of(spans, client):
    client.flush()
    (root,) = [span for span in spans.get_finished_spans() if span.kind is SpanKind.SERVER]
    return root


@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_about_a_video_is_a_span_with_its_tokens_and_what_was_saved(engine, client, spans, stream):
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "r-1", "baggage": "secret=1"}
    await client.post(CHAT, json=ask_about(data_url(clip()), stream=stream), headers=headers)
    root = root_of(spans, client)
    assert root.name == "chat llava"
    assert format(root.context.trace_id, "032x") == TRACE
    assert format(root.parent.span_id, "016x") == PARENT
    seconds = root.attributes.get("gen_ai.response.time_to_first_chunk")
    assert (seconds > 0) if stream else (seconds is None)
    assert {name: v for name, v in root.attributes.items() if name != "gen_ai.response.time_to_first_chunk"} == {
        "http.request.method": "POST",
        "http.route": CHAT,
        "http.response.status_code": 200,
        "aot.request_id": "r-1",
        "aot.video_tokens.before": 6272,
        "aot.video_tokens.after": 627,
        "aot.video_retention": 627 / 6272,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": "llava",
        "gen_ai.request.stream": stream,
        "gen_ai.response.model": "llava",
        "gen_ai.usage.input_tokens": 640,
        "gen_ai.usage.output_tokens": 12,
    }
    below = [span for span in spans.get_finished_spans() if span is not root]
    assert all(span.parent.span_id == root.context.span_id for span in below)
    assert {span.name for span in below} == {"parse", "probe", "queue", "connect", "engine"}
    assert all(root.start_time - 10**7 <= s.start_time <= s.end_time <= root.end_time + 10**7 for s in below)
    (hop,) = [span for span in below if span.name == "engine"]
    assert hop.kind is SpanKind.CLIENT
    assert hop.attributes["aot.engine"] == "engine-0"
    assert engine.request_headers[0]["traceparent"] == f"00-{TRACE}-{hop.context.span_id:016x}-01"
    assert "baggage" not in engine.request_headers[0]


async def test_an_error_is_a_span_with_its_reason(engine, client, spans):
    engine.error = (500, b"{}", "application/json")
    await client.post(CHAT, json=ask())
    root = root_of(spans, client)
    assert root.status.status_code is StatusCode.ERROR
    assert root.attributes["error.type"] == "engine_failed"
    spans.clear()
    await client.post(CHAT, json=ask(model="my private words"))
    root = root_of(spans, client)
    assert root.name == "chat"
    assert root.status.status_code is StatusCode.UNSET
    assert root.attributes["error.type"] == "unknown_model"
    assert "private" not in root.to_json()


async def test_other_routes_have_a_span_if_they_are_the_apis(client, spans):
    await client.get("/health/live")
    await client.get("/metrics")
    client.flush()
    assert spans.get_finished_spans() == ()
    await client.get("/v1/models")
    assert root_of(spans, client).name == "/v1/models"


async def test_a_process_exports_over_otlp_and_waits_for_no_collector_that_is_gone(engine):
    received = asyncio.Queue()

    async def collect(request):
        await received.put(ExportTraceServiceRequest.FromString(await request.read()))
        return web.Response(content_type="application/x-protobuf")

    app = web.Application()
    app.router.add_post("/v1/traces", collect)
    runner = web.AppRunner(app, shutdown_timeout=0.2)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    collector = f"http://127.0.0.1:{runner.addresses[0][1]}"
    otel = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector, "OTEL_BSP_SCHEDULE_DELAY": "100", "OTEL_SERVICE_NAME": "ours"}
    async with GatewayProcess(engine.url, environment=otel) as gateway, httpx.AsyncClient() as client:
        await client.post(gateway.url + CHAT, json=ask())
        names = set()
        while "chat llava" not in names:  # spans are exported in batches when they end
            (exported,) = (await asyncio.wait_for(received.get(), 10)).resource_spans
            names |= {span.name for scope in exported.scope_spans for span in scope.spans}
        assert names == {"chat llava", "parse", "queue", "connect", "engine"}
        about = {attribute.key: attribute.value.string_value for attribute in exported.resource.attributes}
        assert about["service.name"] == "ours"
        await runner.cleanup()
        await client.post(gateway.url + CHAT, json=ask())
        gateway.drain()
        code, output = await gateway.ended()
    assert code == 0, output


def test_without_an_endpoint_nothing_of_it_is_loaded():
    program = (
        "import sys, server.__main__ as m; assert m._tracing() is None;"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    for environment in ({}, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"}):
        output = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        ).stdout
        assert output == "[]\n"
