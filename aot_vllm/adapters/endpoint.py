"""The `vllm.endpoint_plugins` entry point: savings in headers, counters on `/metrics`, and what the engine tells.

Headers are sent before the first byte of a body, so streams carry them too. The videos of a request are known once its
prompt is rendered, which happens in a task of the handler. So the middleware puts a mutable object into a context
variable. The task inherits the context, and the observer of the renderer fills the object.
"""

from __future__ import annotations

import asyncio
import math
import time
from argparse import Namespace
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastapi import HTTPException
from vllm.logger import init_logger

from aot_vllm.adapters.activation import WORKER_EXTENSION
from aot_vllm.adapters.compat import is_first_api_server, observe_rendered_chats, statistics_of_engines
from aot_vllm.adapters.description import active_reduction, describe_engine
from aot_vllm.adapters.prefill import measure_prefill
from aot_vllm.adapters.settings import PluginSettings
from aot_vllm.adapters.telemetry import LEDGER, VideoSavings, WorkerTotals, count, show

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.datastructures import State
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
    from vllm.engine.protocol import EngineClient

logger = init_logger("vllm.aot")

CHAT_PATH = "/v1/chat/completions"
RESPONSES_PATH = "/v1/responses"
METRICS_PATH = "/metrics"
ENGINE_PATH = "/v1/aot/engine"
"""Under `/v1`, which vLLM's API key guards."""
TOLD_AGAIN_SECONDS = 30.0
"""How old the workers' statistics may be in what the engine tells about itself."""
STATISTICS_TIMEOUT_SECONDS = 2.0
"""A busy engine answers between two steps. After this time a scrape shows the values of the previous scrape."""


@dataclass
class _Request:
    videos: list[VideoSavings] = field(default_factory=list)


_current: ContextVar[_Request | None] = ContextVar("aot_request", default=None)


def note_rendered(engine_inputs: Sequence[Any]) -> None:
    """Add the videos of rendered engine inputs to the request that is being served, and to the counters."""
    request = _current.get()
    if request is None:
        return
    for engine_input in engine_inputs:
        for mm_hash in (engine_input.get("mm_hashes") or {}).get("video", ()):
            if savings := LEDGER.read(mm_hash):
                request.videos.append(savings)
                count(savings)


class SavingsMiddleware:
    """Pure ASGI: adds `x-aot-video-*` headers to answers about videos, and updates counters before a scrape."""

    def __init__(self, app: ASGIApp, *, endpoint: AOTEndpoint) -> None:
        """Wrap `app`."""
        self.app = app
        self.endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        path = scope.get("path", "")
        if scope["type"] != "http" or path not in (CHAT_PATH, RESPONSES_PATH, METRICS_PATH):
            await self.app(scope, receive, send)
            return
        if path == METRICS_PATH:
            await self.endpoint.refresh_counters()
            await self.app(scope, receive, send)
            return

        request = _Request()
        token = _current.set(request)

        async def send_with_savings(message: Message) -> None:
            if message["type"] == "http.response.start" and (total := VideoSavings.total(request.videos)):
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-aot-video-tokens-before", str(total.before).encode()),
                    (b"x-aot-video-tokens-after", str(total.after).encode()),
                    (b"x-aot-video-retention", f"{total.retention:g}".encode()),
                ]
            await send(message)

        try:
            await self.app(scope, receive, send_with_savings)
        finally:
            _current.reset(token)


class AOTEndpoint:
    """The endpoint plugin that vLLM's API server loads when `VLLM_PLUGINS` names `aot`."""

    name = "aot"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        """Start without an engine; `init_state` gives it."""
        self._engine: EngineClient | None = None
        self._description: dict[str, Any] | None = None
        self._prefill: dict[str, Any] | None = None
        self._refreshed = -math.inf
        self._worker_totals = WorkerTotals()
        self._refreshing = asyncio.Lock()

    def attach_router(self, app: FastAPI) -> None:
        """Add the middleware, and the route on which the engine tells a gateway what it needs to know."""
        app.add_middleware(SavingsMiddleware, endpoint=self)
        app.add_api_route(ENGINE_PATH, self.describe, methods=["GET"])

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Observe rendered chats and describe the engine. If the workers have AOT's extension, ask them at each scrape.

        Only the first of several API servers asks, because each would count the same reductions.
        """
        observe_rendered_chats(state, note_rendered)
        if engine_client is None:
            return
        self._description = describe_engine(
            engine_client.vllm_config,
            models=list(args.served_model_name or [args.model]),
            request_kwargs_trusted=args.trust_request_mm_kwargs,
            prompt_tokens_details=args.enable_prompt_tokens_details,
        )
        if reduction := active_reduction(engine_client.vllm_config):
            show(reduction)
        extended = engine_client.vllm_config.parallel_config.worker_extension_cls == WORKER_EXTENSION
        if extended and is_first_api_server(engine_client.vllm_config):
            self._engine = engine_client
            if PluginSettings.from_additional_config(engine_client.vllm_config.additional_config).measure_prefill:
                self._prefill = await measure_prefill(engine_client)

    async def describe(self) -> dict[str, Any]:
        """Return what the engine tells about itself; 404 on a server without an engine.

        See `describe_engine`, and `measure_prefill` for its `prefill`, which only the first API server has.
        """
        if self._description is None:
            raise HTTPException(404, "this server has no engine")
        if self._prefill is None:
            return self._description
        if time.monotonic() - self._refreshed > TOLD_AGAIN_SECONDS:
            await self.refresh_counters()
        per_token = self._worker_totals.reduction_seconds_per_token
        return {**self._description, "prefill": {**self._prefill, "reduction_seconds_per_token": per_token}}

    async def refresh_counters(self) -> None:
        """Update the counters with the workers' statistics, or leave them if the engine does not answer in time."""
        if self._engine is None or self._refreshing.locked():
            return
        async with self._refreshing:
            self._refreshed = time.monotonic()
            try:
                async with asyncio.timeout(STATISTICS_TIMEOUT_SECONDS):
                    statistics = await statistics_of_engines(self._engine)
            except Exception as exc:  # a scrape must be answered even if the engine is dead
                logger.warning_once("AOT: the engine did not report its reductions: %s", type(exc).__name__)
                return
            self._worker_totals.count(statistics)
