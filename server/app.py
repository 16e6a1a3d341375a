"""All the wiring: settings in, application out."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.routing import Route

from server import __version__
from server.aliases import load_aliases
from server.catalogue import Catalogue
from server.engines import EnginePool
from server.gate import Gate
from server.lifecycle import Lifecycle
from server.media import fetch
from server.media.intake import Intake
from server.media.probe import Prober
from server.media.store import MediaStore
from server.metrics import Metrics
from server.middleware import ErrorsInOpenAIShape, Observed, RefuseWhileDraining, raise_in_our_terms
from server.parameters import Bounds
from server.routes.chat import ChatCompletions
from server.routes.models import models_router
from server.routes.ops import ops_router
from server.routes.text import Completions, Responses
from server.settings import Settings
from server.upstream import Upstream, new_session

if TYPE_CHECKING:
    from server.tracing import Tracing


def create_app(
    settings: Settings,
    *,
    registry: CollectorRegistry | None = None,
    lifecycle: Lifecycle | None = None,
    tracing: "Tracing | None" = None,
) -> FastAPI:
    """Return the gateway as an application.

    Its metrics go to `registry`, a new one by default; `lifecycle` is how its runner makes it drain;
    `tracing` makes its spans, none by default.
    Raises ConfigurationError if the file that `settings.config` names is wrong.
    """
    aliases = load_aliases(settings.config) if settings.config is not None else None
    metrics = Metrics(registry or CollectorRegistry())
    lifecycle = lifecycle or Lifecycle(settings.drain_seconds)

    @contextlib.asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            await _open(app, stack)
            yield

    async def _open(app: FastAPI, stack: contextlib.AsyncExitStack) -> None:
        engines = await stack.enter_async_context(
            new_session(connect_seconds=settings.engine_connect_seconds, read_seconds=settings.engine_read_seconds)
        )
        hosts = await stack.enter_async_context(fetch.new_session(connect_seconds=settings.media_fetch_seconds))
        pool = EnginePool(
            settings.engines, session=engines, metrics=metrics, health_seconds=settings.engine_health_seconds
        )
        store = _store(settings)
        prober = Prober(seconds=settings.media_probe_seconds)
        stack.push_async_callback(prober.close)
        catalogue = Catalogue(aliases=aliases, pool=pool)
        fetcher = fetch.Fetcher(
            session=hosts,
            allow_hosts=settings.media_allow_hosts,
            allow_http=settings.media_allow_http,
            max_bytes=settings.media_max_bytes,
            total_seconds=settings.media_fetch_seconds,
        )
        intake = Intake(
            fetcher=fetcher,
            prober=prober,
            store=store,
            max_bytes=settings.media_max_bytes,
            max_seconds=settings.media_max_seconds,
            metrics=metrics,
        )
        common: dict[str, Any] = {
            "catalogue": catalogue,
            "gate": Gate(
                max_concurrency=settings.max_concurrency,
                max_queue=settings.max_queue,
                queue_seconds=settings.queue_seconds,
                metrics=metrics,
            ),
            "upstream": Upstream(
                session=engines, pool=pool, metrics=metrics, headers_seconds=settings.engine_headers_seconds
            ),
            "lifecycle": lifecycle,
            "metrics": metrics,
            "bounds": Bounds(max_choices=settings.max_choices, max_output_tokens=settings.max_output_tokens),
            "chat_template_kwargs": frozenset(settings.chat_template_kwargs),
            "max_body_bytes": settings.max_body_bytes,
            "body_seconds": settings.body_seconds,
        }
        for endpoint in (ChatCompletions(**common, intake=intake), Completions(**common), Responses(**common)):
            app.router.routes.append(Route(endpoint.path, endpoint, methods=["POST"]))
        app.include_router(models_router(catalogue))
        app.include_router(ops_router(lifecycle=lifecycle, pool=pool, registry=metrics.registry))
        if tracing is not None:
            stack.push_async_callback(tracing.close)
        await pool.check()
        for chore in [pool.watch(), *([] if store is None else [store.watch()])]:
            stack.push_async_callback(_ended, asyncio.create_task(chore))

    app = FastAPI(
        title="AOT gateway",
        version=__version__,
        lifespan=running,
        openapi_url=None,
        redirect_slashes=False,
        exception_handlers={HTTPException: raise_in_our_terms},
    )
    app.add_middleware(RefuseWhileDraining, lifecycle=lifecycle)  # the last added is the outermost
    app.add_middleware(ErrorsInOpenAIShape)
    app.add_middleware(Observed, metrics=metrics, tracing=tracing)
    return app


def _store(settings: Settings) -> MediaStore | None:
    if settings.media_handoff != "file" or settings.media_dir is None:
        return None
    return MediaStore(
        settings.media_dir, max_bytes=settings.media_store_bytes, max_age_seconds=settings.media_store_seconds
    )


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
