"""The middleware that applies the tenants' limits to API requests."""

from collections.abc import Callable, Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.admission.quotas import Quotas
from server.edge.body import skim_model
from server.edge.state import caller_of, record_of, set_allowance
from server.errors import RateLimited
from server.observe.record import NO_MODEL

MODELS_PATH = "/v1/models"


class Limited:
    """Middleware that counts API requests against their tenant's limits, except those that only look models up."""

    def __init__(
        self, app: ASGIApp, *, quotas: Quotas, models: Callable[[], Collection[str]], max_body_bytes: int
    ) -> None:
        """Wrap `app`. `models` returns the models by whose names refused requests are counted."""
        self._app = app
        self._quotas = quotas
        self._models = models
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or not _is_counted(scope["method"], scope["path"]):
            await self._app(scope, receive, send)
            return
        record = record_of(scope)
        allowance = self._quotas.allowance(caller_of(scope).tenant)
        set_allowance(scope, allowance)
        try:
            try:
                await allowance.enter()
                await self._app(scope, receive, send)
            finally:
                await allowance.leave(tokens=record.tokens)
        except RateLimited:
            allowance.note_refused()
            if record.model == NO_MODEL and scope["method"] == "POST":
                model = await skim_model(Headers(scope=scope), receive, self._models(), max_bytes=self._max_body_bytes)
                record.model = model or NO_MODEL
            raise


def _is_counted(method: str, path: str) -> bool:
    """Return whether a request counts. Many clients poll the models, which costs nothing."""
    is_look_up = method in ("GET", "HEAD") and (path == MODELS_PATH or path.startswith(f"{MODELS_PATH}/"))
    return path.startswith("/v1/") and not is_look_up
