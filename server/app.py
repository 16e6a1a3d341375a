"""All the wiring: settings in, application out."""

import asyncio
import contextlib
import functools
import logging
import secrets
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.routing import Route

from server import __version__, configuration, openapi
from server.admission.auth import metrics_keys, tenant_keys
from server.admission.buffers import Buffers
from server.admission.drain import Lifecycle
from server.admission.gate import Gate
from server.admission.quotas import Counts, Quotas, shared_storage
from server.edge.authentication import Authenticated
from server.edge.limits import Limited
from server.edge.middleware import ErrorsInOpenAIShape, Observed, RefuseWhileDraining, raise_in_our_terms
from server.engines.catalogue import Catalogue
from server.engines.exchange import Upstream, new_session
from server.engines.pool import EnginePool
from server.errors import ConfigurationError
from server.media import fetch
from server.media.facts import Limits
from server.media.intake import Intake
from server.media.probe import Prober
from server.media.store import MediaStore
from server.media.uploads import FileStore
from server.observe.metrics import Metrics
from server.requests.parameters import Bounds
from server.routes.chat import ChatCompletions
from server.routes.files import files_router
from server.routes.models import models_router
from server.routes.ops import ops_router
from server.routes.text import Completions, Responses
from server.settings import PREFIX, Settings

if TYPE_CHECKING:
    from server.observe.tracing import Tracing

logger = logging.getLogger(__name__)


def create_app(
    settings: Settings,
    *,
    registry: CollectorRegistry | None = None,
    lifecycle: Lifecycle | None = None,
    network: fetch.Network | None = None,
    tracing: "Tracing | None" = None,
) -> FastAPI:
    """Return the gateway as an application.

    Its metrics go to `registry`, a new one by default; `lifecycle` is how its runner makes it drain; `tracing` makes
    its spans, none by default. Media are fetched through `network`, the machine's own by default.
    Raises ConfigurationError if a file that the settings name is wrong, or if the gateway would be open unawares.
    """
    config = configuration.load(settings.config) if settings.config is not None else configuration.Configuration()
    if config.tenants is None:
        _refuse_open_off_loopback(settings)
    engine_key = _engine_key(settings)
    metrics = Metrics(registry or CollectorRegistry())
    for name, alias in (config.aliases or {}).items():
        metrics.retention_limit.labels(name).set(alias.max_retention)
    lifecycle = lifecycle or Lifecycle(settings.drain_seconds)

    counts = Counts(shared_storage(settings.limits_backend.get_secret_value()), metrics=metrics)
    quotas = Quotas(limits_of=config.limits_of, counts=counts, metrics=metrics)

    @contextlib.asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            await _open(app, stack)
            yield

    async def _open(app: FastAPI, stack: contextlib.AsyncExitStack) -> None:
        if config.tenants is None:
            who = "THIS MACHINE" if settings.is_loopback else "EVERYONE WHO CAN REACH IT"
            logger.warning("THE GATEWAY IS OPEN TO %s: no API keys are configured", who)
        engines = await stack.enter_async_context(
            new_session(
                connect_seconds=settings.engine_connect_seconds,
                read_seconds=settings.engine_read_seconds,
                api_key=engine_key,
            )
        )
        hosts = await stack.enter_async_context(fetch.sessions(network, connect_seconds=settings.media_fetch_seconds))
        pool = EnginePool(
            settings.engines, session=engines, metrics=metrics, health_seconds=settings.engine_health_seconds
        )
        stack.push_async_callback(counts.close)
        store = _store(settings)
        prober = Prober(limits=_limits(settings), seconds=settings.media_probe_seconds)
        stack.callback(prober.close)
        files = _files(settings, prober)
        catalogue = Catalogue(aliases=config.aliases, pool=pool)
        fetcher = fetch.Fetcher(
            sessions=hosts,
            rules=fetch.HostRules(
                allow=frozenset(settings.media_allow_hosts),
                deny=frozenset(settings.media_deny_hosts),
                only=frozenset(settings.media_only_hosts),
            ),
            allow_http=settings.media_allow_http,
            max_bytes=settings.media_max_bytes,
            total_seconds=settings.media_fetch_seconds,
        )
        intake = Intake(
            fetcher=fetcher,
            prober=prober,
            store=store,
            uploads=files,
            max_bytes=settings.media_max_bytes,
            max_decoded_bytes=settings.media_max_decoded_bytes,
            secret=_secret(settings),
            metrics=metrics,
        )
        common: dict[str, Any] = {
            "catalogue": catalogue,
            "buffers": Buffers(max_bytes=settings.max_buffered_bytes, metrics=metrics),
            "gate": Gate(
                max_concurrency=settings.max_concurrency,
                max_queue=settings.max_queue,
                queue_seconds=settings.queue_seconds,
                metrics=metrics,
            ),
            "upstream": Upstream(
                session=engines, pool=pool, metrics=metrics, headers_seconds=settings.engine_headers_seconds
            ),
            "quotas": quotas,
            "lifecycle": lifecycle,
            "metrics": metrics,
            "bounds": Bounds(max_choices=settings.max_choices, max_output_tokens=settings.max_output_tokens),
            "chat_template_kwargs": frozenset(settings.chat_template_kwargs),
            "max_body_bytes": settings.max_body_bytes,
            "body_seconds": settings.body_seconds,
        }
        for endpoint in (
            ChatCompletions(**common, intake=intake, llm_d_headers=settings.llm_d_headers),
            Completions(**common),
            Responses(**common, intake=intake),
        ):
            app.router.routes.append(Route(endpoint.path, endpoint, methods=["POST"]))
        app.include_router(models_router(catalogue))
        app.include_router(files_router(files, body_seconds=settings.body_seconds))
        app.include_router(
            ops_router(lifecycle=lifecycle, pool=pool, registry=metrics.registry, document=functools.cache(described))
        )
        if tracing is not None:
            stack.push_async_callback(tracing.close)
        await pool.check()
        for chore in [pool.watch(), *(keeper.watch() for keeper in (store, files) if keeper is not None)]:
            stack.push_async_callback(_ended, asyncio.create_task(chore))

    def described() -> dict[str, Any]:
        return openapi.document(
            app.routes,
            operations=openapi.OPERATIONS,
            keys_needed=config.tenants is not None,
            metrics_keys_needed=config.metrics_keys is not None,
        )

    app = FastAPI(
        title="AOT gateway",
        version=__version__,
        lifespan=running,
        openapi_url=None,  # ours is a route like the others
        generate_unique_id_function=lambda route: route.name,
        redirect_slashes=False,
        exception_handlers={HTTPException: raise_in_our_terms, RequestValidationError: raise_in_our_terms},
    )
    app.add_middleware(Limited, quotas=quotas)  # the last added is the outermost
    app.add_middleware(Authenticated, tenants=tenant_keys(config), metrics=metrics_keys(config))
    app.add_middleware(RefuseWhileDraining, lifecycle=lifecycle)
    app.add_middleware(ErrorsInOpenAIShape)
    app.add_middleware(Observed, metrics=metrics, tracing=tracing)
    return app


def _refuse_open_off_loopback(settings: Settings) -> None:
    if not settings.is_loopback and not settings.allow_open:
        raise ConfigurationError(
            f"without API keys, everyone who can reach {settings.host} could use the gateway: name tenants with keys "
            f"in the file of {PREFIX}CONFIG, or listen on 127.0.0.1, or set {PREFIX}ALLOW_OPEN=true"
        )


def _engine_key(settings: Settings) -> str | None:
    if settings.engine_key_file is None:
        return None
    try:
        key = settings.engine_key_file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        key = ""
    if not key.isprintable() or not key or " " in key:
        raise ConfigurationError(
            f"{settings.engine_key_file}: must be a readable file with an API key and nothing else"
        )
    return key


def _store(settings: Settings) -> MediaStore | None:
    if settings.media_handoff != "file" or settings.media_dir is None:
        return None
    return MediaStore(
        settings.media_dir, max_bytes=settings.media_store_bytes, max_age_seconds=settings.media_store_seconds
    )


def _limits(settings: Settings) -> Limits:
    return Limits(
        max_seconds=settings.media_max_seconds,
        max_pixels=settings.media_max_pixels,
        max_frames=settings.media_max_frames,
        sampled_frames=settings.media_sampled_frames,
    )


def _secret(settings: Settings) -> bytes:
    if settings.media_secret is None:
        return secrets.token_bytes()
    return settings.media_secret.get_secret_value().encode()


def _files(settings: Settings, prober: Prober) -> FileStore | None:
    if settings.files_dir is None:
        return None
    return FileStore(
        settings.files_dir,
        prober=prober,
        max_bytes=settings.media_max_bytes,
        tenant_bytes=settings.files_tenant_bytes,
    )


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
