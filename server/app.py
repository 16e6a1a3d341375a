"""All the wiring: builds the application from the settings."""

import asyncio
import contextlib
import functools
import logging
import os
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.types import ASGIApp

from server import __version__, openapi
from server.admission.buffers import Buffers
from server.admission.drain import Drain
from server.admission.entrance import Entrance
from server.admission.gate import Gate
from server.admission.quotas import REDIS_SECONDS, Counts, Quotas, shared_storage
from server.configuration import Configuration
from server.edge.authentication import Authenticated
from server.edge.body import BodyLimits
from server.edge.cors import allow_origins
from server.edge.direct import Direct
from server.edge.limits import Limited
from server.edge.middleware import ErrorsInOpenAIShape, Observed, RefuseWhileDraining, raise_in_our_terms
from server.engines.catalogue import Catalogue
from server.engines.check import Wanted
from server.engines.exchange import Exchanges
from server.engines.pool import EnginePool
from server.engines.session import EngineSession
from server.errors import ConfigurationError
from server.live import LiveConfiguration
from server.media.examine import Examiner
from server.media.fetch import Fetcher, HostRules, Network
from server.media.frames import Sampler
from server.media.intake import Intake
from server.media.readers import Reader
from server.media.store import MediaStore
from server.media.uploads import FileStore
from server.observe.metrics import Metrics
from server.observe.usage import Ledger, shared_usage
from server.reader.facts import Limits
from server.requests.parameters import Bounds
from server.routes.chat import ChatCompletions
from server.routes.files import Files
from server.routes.models import models_router
from server.routes.ops import ops_router
from server.routes.text import Completions, Responses
from server.routes.usage import usage_router
from server.routes.video_tokens import VideoTokens
from server.settings import PREFIX, Settings

if TYPE_CHECKING:
    from server.observe.tracing import Tracing  # imports an optional dependency

logger = logging.getLogger(__name__)


def create_app(
    settings: Settings,
    *,
    registry: CollectorRegistry | None = None,
    drain: Drain | None = None,
    reload: asyncio.Event | None = None,
    network: Network | None = None,
    tracing: "Tracing | None" = None,
) -> FastAPI:
    """Return the gateway as an ASGI application. It opens no connection before its lifespan begins.

    Metrics are registered on `registry`, by default a new one. The caller starts a shutdown through `drain`, and has
    the configuration read again through `reload`. Spans are created by `tracing`, by default none are. Media are
    fetched through `network`, by default the machine's own.
    Raises ConfigurationError if a file named by the settings is wrong, or if the gateway would accept requests
    without API keys from other machines and the operator has not confirmed it.
    """
    metrics = Metrics(registry or CollectorRegistry())
    config = LiveConfiguration(
        settings.config,
        accept=functools.partial(_accept, settings),
        warn=functools.partial(_warn, settings),
        metrics=metrics,
        asked=reload,
    )
    drain = drain or Drain(settings.drain_seconds)
    counts = Counts(shared_storage(settings.limits_backend.get_secret_value()), metrics=metrics)
    ledger = _ledger(settings, metrics)
    engines = _engines(settings, config, metrics)
    media = _media(settings, metrics, network, engines.pool)

    @contextlib.asynccontextmanager
    async def running(_app: FastAPI) -> AsyncIterator[None]:
        config.warn()
        async with contextlib.AsyncExitStack() as stack:
            if tracing is not None:
                stack.push_async_callback(tracing.close)
            stack.push_async_callback(counts.close)
            await stack.enter_async_context(ledger.running())
            await stack.enter_async_context(media.running())
            await stack.enter_async_context(engines.running())
            await stack.enter_async_context(_until_the_end(config.watch()))
            yield

    app = _Application(
        title="AOT gateway",
        version=__version__,
        lifespan=running,
        openapi_url=None,  # routes/ops.py serves our own document
        generate_unique_id_function=lambda route: route.name,
        redirect_slashes=False,
        exception_handlers={HTTPException: raise_in_our_terms, RequestValidationError: raise_in_our_terms},
    )
    _add_routes(app, settings, config, engines=engines, media=media, drain=drain, metrics=metrics)
    app.include_router(usage_router(ledger))
    _add_middleware(app, settings, config, catalogue=engines.catalogue, counts=counts, drain=drain, metrics=metrics)
    app.add_middleware(Observed, metrics=metrics, ledger=ledger, tracing=tracing)
    allow_origins(app, settings.cors_origins, headers=openapi.ANSWER_HEADERS)
    return app


def _add_middleware(
    app: FastAPI,
    settings: Settings,
    config: LiveConfiguration,
    *,
    catalogue: Catalogue,
    counts: Counts,
    drain: Drain,
    metrics: Metrics,
) -> None:
    quotas = Quotas(
        limits_of=lambda tenant: config.active.configuration.limits_of(tenant), counts=counts, metrics=metrics
    )
    direct = [route for route in app.routes if isinstance(route, openapi.RawRoute)]
    app.add_middleware(Direct, routes=direct)  # the middleware added last is the outermost
    app.add_middleware(
        Limited,
        quotas=quotas,
        models=lambda: catalogue.names,
        max_body_bytes=settings.max_body_bytes,
    )
    app.add_middleware(Authenticated, tenants=lambda: config.active.tenants, metrics=lambda: config.active.metrics)
    app.add_middleware(RefuseWhileDraining, drain=drain)
    app.add_middleware(ErrorsInOpenAIShape)


class _Application(FastAPI):
    """An application without Starlette's outermost layer, which answers failures: ErrorsInOpenAIShape does that."""

    def build_middleware_stack(self) -> ASGIApp:
        """Return all other layers."""
        stack = super().build_middleware_stack()
        return stack.app if isinstance(stack, ServerErrorMiddleware) else stack


@dataclass(frozen=True)
class _Engines:
    """The objects that talk to engines."""

    session: EngineSession
    pool: EnginePool
    catalogue: Catalogue
    exchanges: Exchanges

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Check the engines once on entry, then periodically until the block ends."""
        async with self.session:
            await self.pool.check()
            async with _until_the_end(self.pool.watch()):
                yield


@dataclass(frozen=True)
class _Media:
    """The objects that handle media."""

    fetcher: Fetcher
    reader: Reader
    store: MediaStore | None
    uploads: FileStore | None
    intake: Intake

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep the fetcher open and sweep the stores periodically, until the block ends."""
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self.reader.close)
            await stack.enter_async_context(self.fetcher)
            for keeper in (self.store, self.uploads):
                if keeper is not None:
                    await stack.enter_async_context(_until_the_end(keeper.watch()))
            yield


def _ledger(settings: Settings, metrics: Metrics) -> Ledger:
    backend, days = settings.limits_backend.get_secret_value(), settings.usage_days
    return Ledger(shared_usage(backend, seconds=REDIS_SECONDS, days=days), days=days, metrics=metrics)


def _engines(settings: Settings, config: LiveConfiguration, metrics: Metrics) -> _Engines:
    session = EngineSession(
        connect_seconds=settings.engine_connect_seconds,
        api_key=_engine_key(settings),
    )

    def wanted() -> Wanted:
        aliases = config.active.aliases
        return Wanted(
            models=None if aliases is None else frozenset(alias.engine_model for alias in aliases.values()),
            presets=frozenset((a.engine_model, a.preset) for a in (aliases or {}).values() if a.preset is not None),
            decoded_bytes=settings.media_max_decoded_bytes,
            output_tokens=settings.max_output_tokens or 0,
        )

    pool = EnginePool(
        settings.engines,
        session=session,
        metrics=metrics,
        health_seconds=settings.engine_health_seconds,
        read_seconds=settings.engine_read_seconds,
        wanted=wanted,
    )
    return _Engines(
        session=session,
        pool=pool,
        catalogue=Catalogue(aliases=lambda: config.active.aliases, pool=pool),
        exchanges=Exchanges(
            session=session, pool=pool, metrics=metrics, headers_seconds=settings.engine_headers_seconds
        ),
    )


def _media(settings: Settings, metrics: Metrics, network: Network | None, pool: EnginePool) -> _Media:
    limits = Limits(
        max_seconds=settings.media_max_seconds,
        max_pixels=settings.media_max_pixels,
        max_frames=settings.media_max_frames,
        sampled_frames=settings.media_sampled_frames,
    )
    reader = Reader(
        limits=limits,
        seconds=settings.media_read_seconds,
        num_workers=settings.media_readers or os.cpu_count() or 1,
        max_frames_bytes=settings.media_max_decoded_bytes,
    )
    examiner = Examiner(reader, metrics=metrics)
    fetcher = Fetcher(
        rules=HostRules(
            allow=frozenset(settings.media_allow_hosts),
            deny=frozenset(settings.media_deny_hosts),
            only=frozenset(settings.media_only_hosts),
        ),
        allow_http=settings.media_allow_http,
        max_bytes=settings.media_max_bytes,
        total_seconds=settings.media_fetch_seconds,
        network=network,
    )
    store = _store(settings)
    uploads = _uploads(settings, examiner)
    intake = Intake(
        fetcher=fetcher,
        examiner=examiner,
        sampler=Sampler(reader, store=store, metrics=metrics),
        pool=pool,
        full_size=settings.media_full_size,
        store=store,
        uploads=uploads,
        max_bytes=settings.media_max_bytes,
        max_decoded_bytes=settings.media_max_decoded_bytes,
        secret=_secret(settings),
        metrics=metrics,
    )
    return _Media(fetcher=fetcher, reader=reader, store=store, uploads=uploads, intake=intake)


def _store(settings: Settings) -> MediaStore | None:
    if settings.media_handoff != "file" or settings.media_dir is None:
        return None
    return MediaStore(
        settings.media_dir, max_bytes=settings.media_store_bytes, max_age_seconds=settings.media_store_seconds
    )


def _uploads(settings: Settings, examiner: Examiner) -> FileStore | None:
    if settings.files_dir is None:
        return None
    return FileStore(
        settings.files_dir,
        examiner=examiner,
        max_bytes=settings.media_max_bytes,
        tenant_bytes=settings.files_tenant_bytes,
    )


def _secret(settings: Settings) -> bytes:
    if settings.media_secret is None:
        return secrets.token_bytes()
    return settings.media_secret.get_secret_value().encode()


def _add_routes(
    app: FastAPI,
    settings: Settings,
    config: LiveConfiguration,
    *,
    engines: _Engines,
    media: _Media,
    drain: Drain,
    metrics: Metrics,
) -> None:
    entrance = Entrance(
        gate=Gate(
            max_concurrency=settings.max_concurrency,
            max_queue=settings.max_queue,
            queue_seconds=settings.queue_seconds,
            metrics=metrics,
        ),
        buffers=Buffers(max_bytes=settings.max_buffered_bytes, metrics=metrics),
        drain=drain,
    )
    bounds = Bounds(
        max_choices=settings.max_choices,
        max_output_tokens=settings.max_output_tokens,
        chat_template_kwargs=frozenset(settings.chat_template_kwargs),
    )
    body_limits = BodyLimits(max_bytes=settings.max_body_bytes, seconds=settings.body_seconds)
    common = (entrance, body_limits, bounds, engines.catalogue, engines.exchanges, metrics)
    for endpoint in (
        ChatCompletions(*common, intake=media.intake, llm_d_headers=settings.llm_d_headers),
        VideoTokens(*common, intake=media.intake, llm_d_headers=False, pool=engines.pool),
        Completions(*common),
        Responses(*common, intake=media.intake),
    ):
        app.router.routes.append(endpoint.route)
    app.include_router(models_router(engines.catalogue))
    app.include_router(Files(media.uploads, body_seconds=settings.body_seconds).router)
    app.include_router(
        ops_router(drain=drain, pool=engines.pool, registry=metrics.registry, document=_document(app, config))
    )


def _document(app: FastAPI, config: LiveConfiguration) -> Callable[[], dict[str, Any]]:
    made = functools.cache(functools.partial(openapi.document, app.routes))

    def document() -> dict[str, Any]:
        active = config.active
        return made(keys_needed=active.tenants is not None, metrics_keys_needed=active.metrics is not None)

    return document


def _warn(settings: Settings, config: Configuration) -> None:
    """Say what is doubtful in a configuration."""
    if config.tenants is None:
        who = "THIS MACHINE" if settings.is_loopback else "EVERYONE WHO CAN REACH IT"
        logger.warning("THE GATEWAY IS OPEN TO %s: no API keys are configured", who)
    for useless in config.useless_keys(datetime.now(UTC)):
        logger.warning("a key of the configuration file opens nothing: %s", useless)


def _accept(settings: Settings, config: Configuration) -> None:
    """Raise ConfigurationError if a gateway with these settings must not have the configuration."""
    if config.tenants is None and not settings.is_loopback and not settings.allow_open:
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


@contextlib.asynccontextmanager
async def _until_the_end(chore: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run `chore` as a background task, and cancel it when the block ends."""
    task = asyncio.create_task(chore)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
