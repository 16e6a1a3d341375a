"""The middleware that leads requests to the endpoints that are plain ASGI applications."""

from collections.abc import Awaitable, Iterable

from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send


class Direct:
    """Middleware that answers requests for some routes itself, without the framework's own layers.

    Those endpoints raise only errors that the other middleware answers, and have neither parameters nor dependencies.
    Every other request, and a request for these paths with another method, goes the framework's way.
    """

    def __init__(self, app: ASGIApp, *, routes: Iterable[Route]) -> None:
        """Wrap `app`. The `routes` take no parameters in their paths."""
        self._app = app
        self._routes = {(method, route.path): route for route in routes for method in route.methods or ()}

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serve one request. This is no coroutine of its own, because every chunk of a stream passes through each."""
        route = self._routes.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if route is None:
            return self._app(scope, receive, send)
        scope["route"] = route
        return route.app(scope, receive, send)
