"""`GET /health/live`, `/health/ready`, `/metrics` and `/openapi.json`, for whoever runs the gateway or builds on it."""

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from pydantic import BaseModel

from server.admission.drain import Lifecycle
from server.engines.pool import EnginePool
from server.observe.record import STATE_KEY

NOT_READY = "Draining, or no engine is healthy"


class Status(BaseModel):
    """The state of the gateway in a word or two."""

    status: str


def ops_router(
    *, lifecycle: Lifecycle, pool: EnginePool, registry: CollectorRegistry, document: Callable[[], dict[str, Any]]
) -> APIRouter:
    """Return the routes over the gateway's state, and the one for its OpenAPI document."""
    router = APIRouter()

    @router.get("/health/live")
    async def live(request: Request) -> Status:
        request.scope["state"][STATE_KEY].route = "/health/live"
        return Status(status="live")

    @router.get("/health/ready", response_model=Status, responses={503: {"model": Status, "description": NOT_READY}})
    async def ready(request: Request) -> JSONResponse:
        request.scope["state"][STATE_KEY].route = "/health/ready"
        if lifecycle.draining:
            return JSONResponse({"status": "draining"}, 503, {"retry-after": "2"})
        if not pool.any_healthy:
            return JSONResponse({"status": "no healthy engine"}, 503, {"retry-after": "2"})
        return JSONResponse({"status": "ready"})

    @router.get("/metrics", response_class=PlainTextResponse, responses={200: {"description": "Prometheus metrics"}})
    async def metrics(request: Request) -> PlainTextResponse:
        request.scope["state"][STATE_KEY].route = "/metrics"
        return PlainTextResponse(generate_latest(registry), headers={"content-type": CONTENT_TYPE_LATEST})

    @router.get("/openapi.json")
    async def openapi(request: Request) -> dict[str, Any]:
        request.scope["state"][STATE_KEY].route = "/openapi.json"
        return document()

    return router
