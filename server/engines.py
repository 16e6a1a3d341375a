"""The pool of engines: which are up, what they serve, and which one takes the next request."""

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from server.errors import EngineUnavailable
from server.metrics import Metrics

logger = logging.getLogger(__name__)

HEALTH_TIMEOUT_SECONDS = 5.0
SILENT_CHECKS_UNTIL_DOWN = 3  # a busy engine may answer late; a refused connection or an error counts at once


@dataclass(eq=False)
class Engine:
    """One engine. `name` is what metrics and logs call it; the address never leaves the gateway."""

    name: str
    url: str
    healthy: bool = False
    inflight: int = 0
    silent_checks: int = 0
    reports_savings: bool = True
    models: dict[str, dict[str, Any]] = field(default_factory=dict)


Policy = Callable[[Sequence[Engine], str | None], Engine]


def least_inflight(engines: Sequence[Engine], key: str | None) -> Engine:
    """Return the engine with the fewest requests; `key`, what the request is about, plays no part here."""
    del key
    return min(engines, key=lambda engine: engine.inflight)


class EnginePool:
    """The engines, kept current by health checks. `policy` picks among the healthy ones."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        session: aiohttp.ClientSession,
        metrics: Metrics,
        health_seconds: float,
        policy: Policy = least_inflight,
    ) -> None:
        """Start with all engines down; `check` or `watch` finds out."""
        self.engines = [Engine(f"engine-{i}", url) for i, url in enumerate(urls)]
        self._session = session
        self._metrics = metrics
        self._health_seconds = health_seconds
        self._policy = policy
        for engine in self.engines:
            self._metrics.engine_up.labels(engine.name).set(0)

    @property
    def any_healthy(self) -> bool:
        """Whether some engine takes requests."""
        return any(engine.healthy for engine in self.engines)

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        """All models the engines serve, or served when last seen."""
        return {name: card for engine in reversed(self.engines) for name, card in engine.models.items()}

    def choose(self, model: str, *, key: str | None = None, without: Collection[Engine] = ()) -> Engine:
        """Return the engine for a request, out of those known to serve its model if there are any.

        Raises EngineUnavailable if none is healthy or all that are have been tried (`without`).
        """
        healthy = [engine for engine in self.engines if engine.healthy and engine not in without]
        if not healthy:
            raise EngineUnavailable("no engine is available, try again later")
        return self._policy([engine for engine in healthy if model in engine.models] or healthy, key)

    def mark_unreachable(self, engine: Engine) -> None:
        """Take an engine out until its next health check passes."""
        self._set(engine, healthy=False)

    async def check(self) -> None:
        """Check every engine once."""
        await asyncio.gather(*(self._check(engine) for engine in self.engines))

    async def watch(self) -> None:
        """Check the engines for ever."""
        while True:
            await asyncio.sleep(self._health_seconds)
            await self.check()

    async def _check(self, engine: Engine) -> None:
        limit = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_SECONDS)
        try:
            async with self._session.get(f"{engine.url}/health", timeout=limit) as answer:
                healthy = answer.status == 200
            if healthy:
                await self._discover(engine, limit)
        except TimeoutError:
            engine.silent_checks += 1
            healthy = engine.healthy and engine.silent_checks < SILENT_CHECKS_UNTIL_DOWN
        except (aiohttp.ClientError, OSError):
            healthy = False
        else:
            engine.silent_checks = 0
        self._set(engine, healthy=healthy)

    async def _discover(self, engine: Engine, limit: aiohttp.ClientTimeout) -> None:
        async with self._session.get(f"{engine.url}/v1/models", timeout=limit) as answer:
            if answer.status != 200:
                return
            try:
                listing = await answer.json(content_type=None)
                cards = {str(card["id"]): dict(card) for card in listing["data"]}
            except (ValueError, KeyError, TypeError):
                return
        engine.models = cards or engine.models

    def _set(self, engine: Engine, *, healthy: bool) -> None:
        if engine.healthy != healthy:
            logger.info("engine is %s", "up" if healthy else "down", extra={"engine": engine.name})
        engine.healthy = healthy
        self._metrics.engine_up.labels(engine.name).set(int(healthy))
