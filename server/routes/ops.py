"""`GET /health/live`, `/health/ready`, `/metrics` and `/openapi.json`: the endpoints for operators and developers."""

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from pydantic import BaseModel

from server.admission.drain import Drain
from server.engines.pool import EnginePool

NOT_READY = "Draining, or no engine is healthy"
RETRY_AFTER_SECONDS = 2


class Status(BaseModel):
    """The state of the gateway, in one to three words."""

    status: str


class EngineState(BaseModel):
    """The state of one engine, under the name that it has in metrics and logs."""

    engine: str
    up: bool
    failed_checks: list[str]
    """What it is not set up for, by the names of `engine_check`. Empty also if it was never seen."""


class Readiness(Status):
    """Whether the gateway takes requests, and how it found its engines."""

    engines: list[EngineState] | None = None
    """None while the gateway drains, whatever its engines are."""


def ops_router(
    *, drain: Drain, pool: EnginePool, registry: CollectorRegistry, document: Callable[[], dict[str, Any]]
) -> APIRouter:
    """Return the routes for health checks, metrics and the OpenAPI document."""
    router = APIRouter()

    @router.get("/health/live")
    async def live() -> Status:
        return Status(status="live")

    @router.get(
        "/health/ready",
        responses={503: {"model": Readiness, "description": NOT_READY}},
        response_model_exclude_none=True,
    )
    async def ready(response: Response) -> Readiness:
        engines = [
            EngineState(engine=engine.name, up=engine.healthy, failed_checks=list(engine.failed_checks))
            for engine in pool.engines
        ]
        if not drain.has_begun and pool.any_healthy:
            return Readiness(status="ready", engines=engines)
        response.status_code = 503
        response.headers["retry-after"] = str(RETRY_AFTER_SECONDS)
        if drain.has_begun:
            return Readiness(status="draining")
        return Readiness(status="no healthy engine", engines=engines)

    @router.get("/metrics", response_class=PlainTextResponse, responses={200: {"description": "Prometheus metrics"}})
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(generate_latest(registry), headers={"content-type": CONTENT_TYPE_LATEST})

    @router.get("/openapi.json")
    async def openapi() -> dict[str, Any]:
        return document()

    return router
