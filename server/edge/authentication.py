"""The middleware that checks API keys, before any other part of a request is read."""

from collections.abc import Awaitable, Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.admission.auth import Caller, KeyRing
from server.edge.state import set_caller

OPEN_PATHS = frozenset({"/health/live", "/health/ready", "/openapi.json"})
METRICS_PATHS = frozenset({"/metrics", "/metrics/usage.csv"})


class Authenticated:
    """Middleware that refuses requests without a valid key and stores the caller in the request's scope.

    Every path needs a key except OPEN_PATHS, so a new path is protected by default.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        tenants: Callable[[], KeyRing[Caller] | None],
        metrics: Callable[[], KeyRing[None] | None],
    ) -> None:
        """Wrap `app`. Each returns the keys in use, None while none is needed: for the API, and for METRICS_PATHS."""
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
        if path in METRICS_PATHS:
            if (readers := self._metrics()) is not None:
                readers.holder(Headers(scope=scope))
        elif path not in OPEN_PATHS and (tenants := self._tenants()) is not None:
            set_caller(scope, tenants.holder(Headers(scope=scope)))
