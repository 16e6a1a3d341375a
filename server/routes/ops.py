"""`GET /health/live`, `/health/ready` and `/metrics`, for whoever runs the gateway."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from server.engines import EnginePool
from server.lifecycle import Lifecycle
from server.record import STATE_KEY


def ops_router(*, lifecycle: Lifecycle, pool: EnginePool, registry: CollectorRegistry) -> APIRouter:
    """Return the routes over the gateway's state."""
    router = APIRouter()

    @router.get("/health/live")
    async def live(request: Request) -> dict[str, str]:
        request.scope["state"][STATE_KEY].route = "/health/live"
        return {"status": "live"}

    @router.get("/health/ready")
    async def ready(request: Request) -> JSONResponse:
        request.scope["state"][STATE_KEY].route = "/health/ready"
        if lifecycle.draining:
            return JSONResponse({"status": "draining"}, 503, {"retry-after": "2"})
        if not pool.any_healthy:
            return JSONResponse({"status": "no healthy engine"}, 503, {"retry-after": "2"})
        return JSONResponse({"status": "ready"})

    @router.get("/metrics")
    async def metrics(request: Request) -> Response:
        request.scope["state"][STATE_KEY].route = "/metrics"
        return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_LATEST})

    return router
