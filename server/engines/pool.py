"""The pool of engines: which are up, what they serve, and which one takes the next request."""

import asyncio
import itertools
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from server.engines import routing
from server.engines.breaker import Breaker
from server.engines.profile import PATH as PROFILE_PATH
from server.engines.profile import EngineProfile, VideoRules, read_profile
from server.engines.session import EngineSession
from server.errors import EngineUnavailable
from server.observe.metrics import Metrics

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
    last_chosen: int = 0
    silent_checks: int = 0
    reports_savings: bool = True
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    profile: EngineProfile | None = None
    """What the engine tells of itself; None if it has no AOT plugin that tells."""
    breaker: Breaker = field(default_factory=Breaker)

    @property
    def video_rules(self) -> VideoRules | None:
        """The rules for handing over frames; None if the engine has to be handed videos as they are."""
        return None if self.profile is None else self.profile.video_rules


class Attempt:
    """One request at one engine. Whoever makes it says how it went; nothing said means that nobody can tell."""

    def __init__(self, engine: Engine, pool: "EnginePool") -> None:
        """Count the request as the engine's."""
        self.engine = engine
        self._pool = pool
        self._on_trial = engine.breaker.begin()
        engine.inflight += 1

    def succeeded(self) -> None:
        """Note that the engine has answered, be it with a refusal that the request deserved."""
        self._pool.note_success(self.engine)

    def failed(self) -> None:
        """Note that the engine was silent, broke off or answered with an error of its own."""
        self._pool.note_failure(self.engine, on_trial=self._on_trial)

    def unreachable(self) -> None:
        """Note that the engine could not be connected to: it is out until its next health check passes."""
        self._pool.mark_unreachable(self.engine)

    def end(self) -> None:
        """Count the request no longer."""
        self.engine.inflight -= 1
        self.engine.breaker.end(trial=self._on_trial)


class EnginePool:
    """The engines, kept current by health checks and by how requests fare."""

    def __init__(self, urls: Sequence[str], *, session: EngineSession, metrics: Metrics, health_seconds: float) -> None:
        """Start with all engines down; `check` or `watch` finds out."""
        self.engines = [Engine(f"engine-{i}", url) for i, url in enumerate(urls)]
        self._session = session
        self._metrics = metrics
        self._health_seconds = health_seconds
        self._choices = itertools.count(1)
        for engine in self.engines:
            self._metrics.engine_up.labels(engine.name).set(0)
            self._metrics.engine_breaker_open.labels(engine.name).set(0)

    @property
    def any_healthy(self) -> bool:
        """Whether some engine takes requests."""
        return any(engine.healthy for engine in self.engines)

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        """All models the engines serve, or served when last seen."""
        return {name: card for engine in reversed(self.engines) for name, card in engine.models.items()}

    def video_rules(self, model: str) -> VideoRules | None:
        """Return the rules by which frames are handed to the engines that serve a model.

        None if one of them has to be handed videos as they are, or if they disagree, as during a rolling upgrade.
        """
        serving = [engine for engine in self.engines if engine.healthy and model in engine.models]
        told = [engine.video_rules for engine in serving]
        return told[0] if told and all(rules == told[0] for rules in told) else None

    @contextmanager
    def attempt(
        self,
        model: str,
        *,
        key: str | None = None,
        rules: VideoRules | None = None,
        without: Collection[Engine] = (),
    ) -> Iterator[Attempt]:
        """Choose an engine for a request and count the request as its own until the block ends; raises as `choose`."""
        attempt = Attempt(self.choose(model, key=key, rules=rules, without=without), self)
        try:
            yield attempt
        finally:
            attempt.end()

    def choose(
        self,
        model: str,
        *,
        key: str | None = None,
        rules: VideoRules | None = None,
        without: Collection[Engine] = (),
    ) -> Engine:
        """Return the engine for a request about `model`, and about media with the given key.

        `rules`: those by which frames were made for the request; an engine with others couldn't use them.
        Raises EngineUnavailable if no engine that serves the model takes requests, or all have been tried (`without`).
        """
        serving = [
            engine
            for engine in self.engines
            if engine.healthy and model in engine.models and (rules is None or engine.video_rules == rules)
        ]
        candidates = [engine for engine in serving if engine not in without and engine.breaker.admits]
        if not candidates:
            waits = [engine.breaker.seconds_to_trial() for engine in serving]
            raise EngineUnavailable(
                "no engine that serves this model is available, try again later",
                retry_after_seconds=min(waits, default=None),
            )
        engine, affinity = routing.choose(candidates, key)
        engine.last_chosen = next(self._choices)
        if not without:  # a second attempt goes where it can
            self._metrics.affinity.labels(affinity).inc()
        return engine

    def note_success(self, engine: Engine) -> None:
        """Let requests pass freely to an engine that has answered one."""
        if not engine.breaker.closed:
            logger.info("engine answers again", extra={"engine": engine.name})
            self._metrics.engine_breaker_open.labels(engine.name).set(0)
        engine.breaker.succeed()

    def note_failure(self, engine: Engine, *, on_trial: bool) -> None:
        """Count a failure against an engine, which may keep requests from it for a while."""
        if engine.breaker.fail(trial=on_trial):
            seconds = round(engine.breaker.seconds_to_trial(), 3)
            logger.warning("engine keeps failing", extra={"engine": engine.name, "seconds_to_trial": seconds})
            self._metrics.engine_breaker_open.labels(engine.name).set(1)

    def mark_unreachable(self, engine: Engine) -> None:
        """Take an engine out until its next health check passes."""
        self._set(engine, healthy=False)

    async def check(self) -> None:
        """Check every engine once."""
        await asyncio.gather(*(self._check(engine) for engine in self.engines))

    async def watch(self) -> None:
        """Check the engines for ever, each at its own pace: a silent one does not delay what is known of the others."""
        await asyncio.gather(*(self._watch(engine) for engine in self.engines))

    async def _watch(self, engine: Engine) -> None:
        while True:
            await asyncio.sleep(self._health_seconds)
            await self._check(engine)

    async def _check(self, engine: Engine) -> None:
        limit = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_SECONDS)
        try:
            async with self._session.http.get(f"{engine.url}/health", timeout=limit) as answer:
                healthy = answer.status == 200
            if healthy:
                await self._discover(engine, limit)
                await self._read_profile(engine, limit)
                healthy = bool(engine.models)
        except TimeoutError:
            engine.silent_checks += 1
            healthy = engine.healthy and engine.silent_checks < SILENT_CHECKS_UNTIL_DOWN
        except (aiohttp.ClientError, OSError):
            healthy = False
        else:
            engine.silent_checks = 0
        self._set(engine, healthy=healthy)

    async def _discover(self, engine: Engine, limit: aiohttp.ClientTimeout) -> None:
        async with self._session.http.get(f"{engine.url}/v1/models", timeout=limit) as answer:
            if answer.status != 200:
                return
            try:
                listing = await answer.json(content_type=None)
                cards = {str(card["id"]): dict(card) for card in listing["data"]}
            except (ValueError, KeyError, TypeError):
                return
        if cards and cards.keys() != engine.models.keys():
            logger.info("engine serves these models", extra={"engine": engine.name, "models": sorted(cards)})
        engine.models = cards or engine.models

    async def _read_profile(self, engine: Engine, limit: aiohttp.ClientTimeout) -> None:
        async with self._session.http.get(f"{engine.url}{PROFILE_PATH}", timeout=limit) as answer:
            try:
                profile = read_profile(await answer.json(content_type=None)) if answer.status == 200 else None
            except ValueError:
                profile = None
        before, engine.profile = engine.video_rules, profile
        if engine.video_rules != before or not engine.healthy:
            logger.info(
                "engine is handed %s",
                "videos as they are" if engine.video_rules is None else "frames",
                extra={"engine": engine.name, "frames_format": profile and profile.frames_format},
            )

    def _set(self, engine: Engine, *, healthy: bool) -> None:
        if engine.healthy != healthy:
            logger.info("engine is %s", "up" if healthy else "down", extra={"engine": engine.name})
            if healthy:  # it may be another process than the one that failed
                self.note_success(engine)
        engine.healthy = healthy
        self._metrics.engine_up.labels(engine.name).set(int(healthy))
