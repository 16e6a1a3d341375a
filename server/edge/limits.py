"""The middleware that applies the tenants' limits to API requests."""

from starlette.types import ASGIApp, Receive, Scope, Send

from server.admission.quotas import Quotas
from server.edge.state import caller_of, record_of, set_allowance

MODELS_PATH = "/v1/models"


class Limited:
    """Middleware that counts API requests against their tenant's limits, except those that only look models up."""

    def __init__(self, app: ASGIApp, *, quotas: Quotas) -> None:
        """Wrap `app`."""
        self._app = app
        self._quotas = quotas

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or not _is_counted(scope["method"], scope["path"]):
            await self._app(scope, receive, send)
            return
        record = record_of(scope)
        allowance = self._quotas.allowance(caller_of(scope).tenant)
        set_allowance(scope, allowance)
        async with allowance.taken(tokens_used=lambda: record.tokens):
            await self._app(scope, receive, send)


def _is_counted(method: str, path: str) -> bool:
    """Return whether a request counts. Many clients poll the models, which costs nothing."""
    is_look_up = method in ("GET", "HEAD") and (path == MODELS_PATH or path.startswith(f"{MODELS_PATH}/"))
    return path.startswith("/v1/") and not is_look_up
