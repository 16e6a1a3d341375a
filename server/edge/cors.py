"""CORS: lets web pages of the operator's choice call the gateway from browsers."""

from collections.abc import Iterable, Sequence
from typing import Any, Final

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

MAX_AGE_SECONDS: Final = 3600


def allow_origins(app: FastAPI, origins: Sequence[str], *, headers: Iterable[str]) -> None:
    """Let pages of these origins call `app` and see `headers` of its answers. Without any origin, do nothing.

    Keys come in headers that the pages set, never in cookies.
    Questions of browsers (preflights) are answered before keys are checked, because browsers send none with them.
    """
    if origins:
        options: dict[str, Any] = {
            "allow_origins": list(origins),
            "allow_methods": ["GET", "POST", "DELETE"],
            "allow_headers": ["*"],
            "expose_headers": sorted(headers),
            "max_age": MAX_AGE_SECONDS,
        }
        app.add_middleware(CORSMiddleware, **options)
