"""The middleware that checks API keys, before any other part of a request is read."""

from collections.abc import Awaitable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.admission.auth import Caller, KeyRing
from server.edge.state import set_caller

OPEN_PATHS = frozenset({"/health/live", "/health/ready", "/openapi.json"})
METRICS_PATH = "/metrics"


class Authenticated:
    """Middleware that refuses requests without a valid key and stores the caller in the request's scope.

    Every path needs a key except OPEN_PATHS, so a new path is protected by default.
    """

    def __init__(self, app: ASGIApp, *, tenants: KeyRing[Caller] | None, metrics: KeyRing[None] | None) -> None:
        """Wrap `app`. If `tenants` is None, the API needs no key; if `metrics` is None, `/metrics` needs none."""
        self._app = app
        self._tenants = tenants
        self._metrics = metrics

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serve one request. This is no coroutine of its own, because every chunk of a stream passes through each."""
        if scope["type"] == "http":
            self._admit(scope)
        return self._app(scope, receive, send)

    def _admit(self, scope: Scope) -> None:
        path: str = scope["path"]
        if path == METRICS_PATH:
            if self._metrics is not None:
                self._metrics.holder(Headers(scope=scope))
        elif self._tenants is not None and path not in OPEN_PATHS:
            set_caller(scope, self._tenants.holder(Headers(scope=scope)))
