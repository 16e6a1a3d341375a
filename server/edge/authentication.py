"""Authentication, before anything else is read of a request."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.admission.auth import Identity, KeyRing
from server.observe.record import STATE_KEY, RequestRecord

OPEN_PATHS = frozenset({"/health/live", "/health/ready", "/openapi.json"})
METRICS_PATH = "/metrics"


class Authenticated:
    """Lets through who has a key, and notes on the record whose it is. What is not named open is closed."""

    def __init__(self, app: ASGIApp, *, tenants: KeyRing[Identity] | None, metrics: KeyRing[None] | None) -> None:
        """Wrap `app`."""
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
            identity = self._tenants.holder(Headers(scope=scope))
            record: RequestRecord = scope["state"][STATE_KEY]
            record.tenant, record.allowed_models = identity.tenant, identity.models
