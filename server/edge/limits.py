"""The middleware that applies the tenants' limits to API requests."""

from starlette.types import ASGIApp, Receive, Scope, Send

from server.admission.quotas import Quotas
from server.edge.state import caller_of, record_of, set_allowance


class Limited:
    """Middleware that counts every API request against its tenant's limits."""

    def __init__(self, app: ASGIApp, *, quotas: Quotas) -> None:
        """Wrap `app`."""
        self._app = app
        self._quotas = quotas

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        record = record_of(scope)
        allowance = self._quotas.allowance(caller_of(scope).tenant)
        set_allowance(scope, allowance)
        async with allowance.taken(tokens_used=lambda: record.tokens):
            await self._app(scope, receive, send)
