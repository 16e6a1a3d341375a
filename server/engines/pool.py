"""The pool of engines: which of them are up, which models they serve, and which one gets the next request."""

import asyncio
import itertools
import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import aiohttp

from server.engines import routing, silence
from server.engines.breaker import Breaker
from server.engines.check import REMEDIES, Check, Wanted, examine
from server.engines.profile import PATH as PROFILE_PATH
from server.engines.profile import EngineProfile, VideoRules, read_profile
from server.engines.session import EngineSession
from server.errors import EngineUnavailable
from server.observe.metrics import Metrics

logger = logging.getLogger(__name__)

HEALTH_TIMEOUT_SECONDS = 5.0
SILENT_CHECKS_UNTIL_DOWN = 3  # time-outs in a row, as a busy engine may answer late; any other failure counts at once

ERRORS_UNTIL_ASKED = 3  # 5xx answers without a good one in between, after which a check asks the engine a question

_LOGGED_OF_PROFILE = {"versions", "architecture", "frames_format", "reduction", "context_length", "limits"}


@dataclass(eq=False)
class Engine:
    """One engine. Metrics and logs show its `name`; its `url` never leaves the gateway."""

    name: str
    url: str
    healthy: bool = False
    inflight: int = 0
    last_chosen: int = 0
    silent_checks: int = 0
    errors_in_a_row: int = 0
    """How many requests it has answered with 5xx since its last good answer, whoever sent them."""
    reports_savings: bool = True
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    profile: EngineProfile | None = None
    """What the engine tells about itself. None if it tells nothing, for example because it runs without the plugin."""
    seen: bool = False
    """Whether it has listed its models at least once."""
    takes_key: bool = True
    checks: dict[Check, bool] = field(default_factory=dict)
    """The outcomes of its examination, see `examine`."""
    breaker: Breaker = field(default_factory=Breaker)
    waits: set[silence.Wait] = field(default_factory=set)
    """How long its requests have waited for it."""

    @property
    def failed_checks(self) -> list[Check]:
        """The checks of its examination that fail."""
        return [check for check, outcome in self.checks.items() if not outcome]

    @property
    def video_rules(self) -> VideoRules | None:
        """The rules for sampling frames for this engine. None if the engine wants the video itself."""
        return None if self.profile is None else self.profile.video_rules


class Attempt(AbstractContextManager["Attempt"]):
    """One request at one engine, where it counts as in flight while its block lasts.

    The caller reports the outcome. Without a report the outcome is unknown, for example because the client left first,
    and the circuit breaker counts neither a success nor a failure.
    """

    def __init__(self, engine: Engine, pool: "EnginePool") -> None:
        """Prepare a request to `engine`, one of `pool`."""
        self.engine = engine
        self._pool = pool
        self._on_trial = False
        self.wait = silence.Wait()

    def __enter__(self) -> Self:
        """Count the request as in flight at the engine."""
        self._on_trial = self.engine.breaker.begin()
        self.engine.inflight += 1
        self.engine.waits.add(self.wait)
        return self

    def answer_begins(self) -> None:
        """Note the first byte of the body. Headers alone do not show that the engine works."""
        self._pool.note_answer(self.engine, complete=False)

    def succeeded(self) -> None:
        """Note a complete answer. A 4xx answer is a success too: the engine works, the request is wrong."""
        self._pool.note_answer(self.engine, complete=True)

    def failed(self) -> None:
        """Note that the engine timed out or broke off its answer."""
        self._pool.note_failure(self.engine, on_trial=self._on_trial)

    def answered_with_error(self, sender: str, content: bytes) -> None:
        """Note that the engine answered with a 5xx error, which may be the fault of the request.

        `sender` is who asked, and `content` identifies the request.
        """
        self._pool.note_error(self.engine, sender, content)

    def unreachable(self) -> None:
        """Note that the engine could not be connected to. It gets no requests until its next health check passes."""
        self._pool.mark_unreachable(self.engine)

    def __exit__(self, *_exc: object) -> None:
        """Stop counting the request as in flight."""
        self.engine.inflight -= 1
        self.engine.waits.discard(self.wait)
        self.engine.breaker.end(trial=self._on_trial)


class EnginePool:
    """The engines and their state, which health checks and the outcomes of requests keep up to date."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        session: EngineSession,
        metrics: Metrics,
        health_seconds: float,
        read_seconds: float,
        wanted: Callable[[], Wanted] = Wanted,
    ) -> None:
        """Start with all engines down, until `check` or `watch` finds them up.

        An engine is asked for its health every `health_seconds`, and may be silent for `read_seconds` while a request
        waits for it. `wanted` returns what the engines should serve.
        """
        self.engines = [Engine(f"engine-{i}", url) for i, url in enumerate(urls)]
        self._session = session
        self._metrics = metrics
        self._health_seconds = health_seconds
        self._read_seconds = read_seconds
        self._wanted = wanted
        self._unserved: frozenset[str] = frozenset()
        self._choices = itertools.count(1)
        for engine in self.engines:
            self._metrics.engine_up.labels(engine.name).set(0)
            self._metrics.engine_breaker_open.labels(engine.name).set(0)

    @property
    def any_healthy(self) -> bool:
        """Whether at least one engine passes its health checks."""
        return any(engine.healthy for engine in self.engines)

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        """The cards of all models by name. An engine that is down counts with the models it served last."""
        return {name: card for engine in reversed(self.engines) for name, card in engine.models.items()}

    def lists(self, model: str) -> bool:
        """Return whether `model` is one of `models`."""
        return any(model in engine.models for engine in self.engines)

    @property
    def all_seen(self) -> bool:
        """Whether every engine has listed its models at least once."""
        return all(engine.seen for engine in self.engines)

    def video_rules(self, model: str) -> VideoRules | None:
        """Return the rules for sampling frames that all engines of a model share.

        None if one of these engines wants the video itself, or if they disagree, as during a rolling upgrade.
        """
        serving = [engine for engine in self.engines if engine.healthy and model in engine.models]
        told = [engine.video_rules for engine in serving]
        return told[0] if told and all(rules == told[0] for rules in told) else None

    def profile(self, model: str, rules: VideoRules) -> EngineProfile | None:
        """Return the profile of an engine that serves `model` by these rules; None if there is none any more."""
        serving = (engine for engine in self.engines if engine.healthy and model in engine.models)
        return next((engine.profile for engine in serving if engine.video_rules == rules), None)

    def retention(self, model: str) -> float | None:
        """Return the share of video tokens that the engines of a model keep by default, None if it is not known."""
        told = {None if profile is None else profile.reduction.retention for profile in self._profiles(model)}
        return told.pop() if len(told) == 1 else None

    def preset(self, model: str) -> str | None:
        """Return the preset that the engines of a model run by default, None if it is not known."""
        told = {None if profile is None else profile.reduction.preset for profile in self._profiles(model)}
        return told.pop() if len(told) == 1 else None

    def _profiles(self, model: str) -> list[EngineProfile | None]:
        return [engine.profile for engine in self.engines if model in engine.models]

    def attempt(
        self,
        model: str,
        *,
        key: str | None = None,
        rules: VideoRules | None = None,
        without: Collection[Engine] = (),
    ) -> Attempt:
        """Choose an engine for a request. The request counts there while the block of the attempt lasts.

        Takes the arguments of `choose` and raises its errors.
        """
        return Attempt(self.choose(model, key=key, rules=rules, without=without), self)

    def choose(
        self,
        model: str,
        *,
        key: str | None = None,
        rules: VideoRules | None = None,
        without: Collection[Engine] = (),
    ) -> Engine:
        """Return the engine for a request to `model`. `key` is the affinity key of its media.

        If frames were sampled for the request, `rules` are the rules that were used: engines with other rules are left
        out. So are the engines in `without`, which have been tried already.
        Raises EngineUnavailable if no engine is left that is up and serves the model.
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
        if not without:  # a retry says nothing about affinity
            self._metrics.affinity.labels(affinity).inc()
        return engine

    def note_answer(self, engine: Engine, *, complete: bool) -> None:
        """Close the engine's circuit breaker, because it answers a request."""
        if not engine.breaker.closed:
            logger.info("engine answers again", extra={"engine": engine.name})
            self._metrics.engine_breaker_open.labels(engine.name).set(0)
        if complete:
            engine.breaker.succeed()
            engine.errors_in_a_row = 0
        else:
            engine.breaker.answer_begins()

    def note_failure(self, engine: Engine, *, on_trial: bool) -> None:
        """Count a failure of the engine, which may open its circuit breaker."""
        if engine.breaker.fail(trial=on_trial):
            self._note_opened(engine)

    def note_error(self, engine: Engine, sender: str, content: bytes) -> None:
        """Count a 5xx answer of the engine, which may open its circuit breaker."""
        engine.errors_in_a_row += 1
        if engine.breaker.note_error(sender, content):
            self._note_opened(engine)

    def _note_opened(self, engine: Engine) -> None:
        seconds = round(engine.breaker.seconds_to_trial(), 3)
        logger.warning("engine keeps failing", extra={"engine": engine.name, "seconds_to_trial": seconds})
        self._metrics.engine_breaker_open.labels(engine.name).set(1)

    def mark_unreachable(self, engine: Engine) -> None:
        """Send no requests to the engine until its next health check passes."""
        self._set(engine, healthy=False)

    async def check(self) -> None:
        """Check every engine once."""
        await asyncio.gather(*(self._check(engine) for engine in self.engines))

    async def watch(self) -> None:
        """Check the engines forever, each in loops of its own, so that a silent engine does not delay the others."""
        await asyncio.gather(
            *(self._watch(engine) for engine in self.engines),
            *(
                silence.watch(
                    engine.url,
                    engine.waits,
                    longest_seconds=self._read_seconds,
                    gone=partial(self.mark_unreachable, engine),
                )
                for engine in self.engines
            ),
        )

    async def _watch(self, engine: Engine) -> None:
        while True:
            await asyncio.sleep(self._health_seconds)
            await self._check(engine)

    async def _check(self, engine: Engine) -> None:
        limit = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_SECONDS)
        try:
            async with self._session.http.get(f"{engine.url}/health", timeout=limit) as answer:
                healthy = answer.status == 200
            if healthy and await self._discover(engine, limit):
                await self._read_profile(engine, limit)
                healthy = bool(engine.models) and await self._answers(engine, limit)
                self._examine(engine, reconnected=healthy and not engine.healthy)
            else:
                healthy = False
        except TimeoutError:
            engine.silent_checks += 1
            healthy = engine.healthy and engine.silent_checks < SILENT_CHECKS_UNTIL_DOWN
        except (aiohttp.ClientError, OSError):
            healthy = False
        else:
            engine.silent_checks = 0
        self._set(engine, healthy=healthy)

    def _examine(self, engine: Engine, *, reconnected: bool) -> None:
        """Check whether the engine is set up for the gateway, and say so when it comes up or something has changed."""
        before, profile = engine.checks, engine.profile
        engine.checks = examine(self._wanted(), takes_key=engine.takes_key, models=engine.models, profile=profile)
        for check in before.keys() - engine.checks.keys():
            self._metrics.engine_check.remove(engine.name, check)
        for check, outcome in engine.checks.items():
            self._metrics.engine_check.labels(engine.name, check).set(int(outcome))
        if engine.checks == before and not reconnected:
            return
        told = {} if profile is None else profile.model_dump(include=_LOGGED_OF_PROFILE)
        failed = list(engine.failed_checks)
        where = {"engine": engine.name, "models": sorted(engine.models), "failed_checks": failed}
        logger.info("engine examined", extra={**where, **told})
        for check in engine.failed_checks:
            logger.warning("engine check failed: %s", REMEDIES[check], extra={"engine": engine.name, "check": check})

    def _note_unserved(self) -> None:
        unserved = (self._wanted().models or frozenset()).difference(self.models)
        if unserved - self._unserved and self.all_seen:
            logger.warning(
                "no engine serves some of the models that aliases name: these aliases are not offered",
                extra={"engine_models": sorted(unserved)},
            )
        self._unserved = unserved if self.all_seen else frozenset()

    async def _answers(self, engine: Engine, limit: aiohttp.ClientTimeout) -> bool:
        """Return whether the engine answers a question. It is asked one only if it keeps answering others with errors.

        This tells an engine that fails everything from one that is sent requests it can't answer.
        """
        if engine.errors_in_a_row < ERRORS_UNTIL_ASKED:
            return True
        question = {"model": next(iter(engine.models)), "prompt": "a", "max_tokens": 1}
        async with self._session.http.post(f"{engine.url}/v1/completions", json=question, timeout=limit) as answer:
            answers = answer.status < 500
        engine.errors_in_a_row = 0 if answers else engine.errors_in_a_row
        return answers

    async def _discover(self, engine: Engine, limit: aiohttp.ClientTimeout) -> bool:
        """Read which models the engine serves; return False if it does not say."""
        async with self._session.http.get(f"{engine.url}/v1/models", timeout=limit) as answer:
            engine.takes_key = answer.status not in (401, 403)
            if not engine.takes_key:
                self._examine(engine, reconnected=False)
            if answer.status != 200:
                return False
            try:
                listing = await answer.json(content_type=None)
                cards = {str(card["id"]): dict(card) for card in listing["data"]}
            except (ValueError, KeyError, TypeError):
                return False
        if cards and cards.keys() != engine.models.keys():
            logger.info("engine serves these models", extra={"engine": engine.name, "models": sorted(cards)})
        engine.models = cards or engine.models
        engine.seen = True
        self._note_unserved()
        return True

    async def _read_profile(self, engine: Engine, limit: aiohttp.ClientTimeout) -> None:
        async with self._session.http.get(f"{engine.url}{PROFILE_PATH}", timeout=limit) as answer:
            try:
                profile = read_profile(await answer.json(content_type=None)) if answer.status == 200 else None
            except ValueError:
                profile = None
        if profile is not None and profile.prefill is None and engine.healthy and engine.profile is not None:
            # of an engine's several API servers only the first has measured the prefill
            profile = profile.model_copy(update={"prefill": engine.profile.prefill})
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
            if healthy:  # the engine may have been restarted since it failed
                self.note_answer(engine, complete=True)
        engine.healthy = healthy
        self._metrics.engine_up.labels(engine.name).set(int(healthy))
