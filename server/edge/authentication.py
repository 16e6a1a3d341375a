"""Authentication, before anything else is read of a request."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.admission.auth import Caller, KeyRing
from server.edge.state import set_caller

OPEN_PATHS = frozenset({"/health/live", "/health/ready", "/openapi.json"})
METRICS_PATH = "/metrics"


class Authenticated:
    """Lets a request through if its key is valid, and notes who sent it. Only OPEN_PATHS need no key."""

    def __init__(self, app: ASGIApp, *, tenants: KeyRing[Caller] | None, metrics: KeyRing[None] | None) -> None:
        """Wrap `app`; without `tenants` the API needs no key, without `metrics` reading metrics needs none."""
        self._app = app
        self._tenants = tenants
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http":
            self._admit(scope)
        await self._app(scope, receive, send)

    def _admit(self, scope: Scope) -> None:
        path: str = scope["path"]
        if path == METRICS_PATH:
            if self._metrics is not None:
                self._metrics.holder(Headers(scope=scope))
        elif self._tenants is not None and path not in OPEN_PATHS:
            set_caller(scope, self._tenants.holder(Headers(scope=scope)))
