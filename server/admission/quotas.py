"""How much tenants may use in a minute: requests, tokens and seconds of video, counted here or shared in Redis."""

import asyncio
import logging
import math
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final, Literal, TypeVar

from limits.aio.storage import MemoryStorage, RedisStorage
from limits.errors import ConfigurationError as MissingPackage

from server.configuration import Limits
from server.errors import ConfigurationError, MediaRefused, RateLimited
from server.observe.metrics import NO_TENANT, Metrics

logger = logging.getLogger(__name__)

MINUTE_SECONDS: Final = 60
BOUNDLESS: Final = 2**53
REDIS_SECONDS: Final = 0.5  # to connect, and to answer
REDIS_PAUSE_SECONDS: Final = 5.0  # after it failed to, so that not every request waits for it

T = TypeVar("T")
Measure = Literal["requests", "tokens", "video-seconds"]
Storage = MemoryStorage | RedisStorage


@dataclass(frozen=True)
class Window:
    """A sliding window: what was counted in the period before and in this one, and how long both still weigh.

    The count is `current`, and of `previous` the share that the window has not yet left behind.
    """

    previous: int
    previous_seconds: float
    current: int
    current_seconds: float
    period_seconds: int

    def remaining(self, limit: int) -> int:
        """Return how much of `limit` is left."""
        weighed = self.previous * self.previous_seconds / self.period_seconds + self.current
        return max(0, limit - math.floor(weighed))

    def seconds_until(self, cost: int, limit: int) -> float:
        """Return the time after which `cost`, at most `limit`, fits if nothing else is counted meanwhile."""
        if cost <= self.remaining(limit):
            return 0.0
        room = limit - cost + 1  # what the count has to fall below, as fractions do not count
        if self.current < room:
            return self.previous_seconds - (room - self.current) * self.period_seconds / self.previous
        return self.current_seconds - self.period_seconds * room / self.current

    @property
    def reset_seconds(self) -> float:
        """The time until all of the limit is there again if nothing else is counted meanwhile."""
        return self.current_seconds if self.current else self.previous_seconds


class Counts:
    """Sliding windows in a shared storage, and in this process where there is none or it can't be reached."""

    def __init__(self, shared: RedisStorage | None, *, metrics: Metrics, period_seconds: int = MINUTE_SECONDS) -> None:
        """Start empty, or with what the shared storage holds."""
        self._shared = shared
        failures = OSError if shared is None else shared.base_exceptions
        self._failures: tuple[type[Exception], ...] = (
            OSError,
            *(failures if isinstance(failures, tuple) else (failures,)),
        )
        self._own = MemoryStorage()
        self._resume = 0.0
        self._period_seconds = period_seconds
        self._up = metrics.limits_backend_up
        self._up.set(1)

    async def take(self, key: str, cost: int, *, limit: int) -> bool:
        """Count `cost` if it fits; return whether it did."""
        return await self._in(lambda it: it.acquire_sliding_window_entry(key, limit, self._period_seconds, cost))

    async def charge(self, key: str, cost: int) -> None:
        """Count what has been used already, also beyond the limit: then the window stays spent for longer."""
        await self.take(key, cost, limit=BOUNDLESS)

    async def window(self, key: str) -> Window:
        """Return the state."""
        state = await self._in(lambda it: it.get_sliding_window(key, self._period_seconds))
        return Window(*state, period_seconds=self._period_seconds)

    async def close(self) -> None:
        """Close the connections."""
        if self._shared is not None:
            bridge: Any = self._shared.bridge
            await bridge.storage.aclose()

    async def _in(self, work: Callable[[Storage], Awaitable[T]]) -> T:
        if self._shared is not None and monotonic() >= self._resume:
            try:
                result = await work(self._shared)
            except self._failures as exc:
                self._lost(exc)
            else:
                self._found()
                return result
        return await work(self._own)

    def _lost(self, exc: Exception) -> None:
        if not self._resume:
            logger.error(
                "the shared limits can't be reached: this gateway counts by itself until they can",
                extra={"failure": type(exc).__name__},
            )
        self._resume = monotonic() + REDIS_PAUSE_SECONDS
        self._up.set(0)

    def _found(self) -> None:
        if self._resume:
            logger.info("the shared limits are back")
        self._resume = 0.0
        self._up.set(1)


def shared_storage(backend: str) -> RedisStorage | None:
    """Return the storage for a Redis URL, None for `memory`; raise ConfigurationError if its client is missing."""
    if backend == "memory":
        return None
    try:
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        return RedisStorage(
            backend,
            implementation="redispy",
            key_prefix="aot-gateway",
            socket_connect_timeout=REDIS_SECONDS,
            socket_timeout=REDIS_SECONDS,
            retry=Retry(NoBackoff(), 1),  # type: ignore[arg-type] # at once: its connection may have gone stale
        )
    except (ImportError, MissingPackage) as exc:
        raise ConfigurationError("limits in Redis need its client: pip install 'aot-vllm[gateway,redis]'") from exc


class Quotas:
    """The limits of all tenants, and what they have used of them."""

    def __init__(self, *, limits_of: Callable[[str], Limits], counts: Counts, metrics: Metrics) -> None:
        """Ask `limits_of` for a tenant's limits."""
        self._limits_of = limits_of
        self.counts = counts
        self.usage = metrics.tenant_usage
        self.running: Counter[str] = Counter()

    def allowance(self, tenant: str) -> "Allowance":
        """Return what one request may take of its tenant's limits."""
        return Allowance(self, tenant, self._limits_of(tenant))


class Allowance:
    """What one request takes of its tenant's limits."""

    def __init__(self, quotas: Quotas, tenant: str, limits: Limits) -> None:
        """Take nothing yet."""
        self._quotas = quotas
        self._tenant = tenant
        self._limits = limits
        self.headers: dict[str, str] = {}
        """The `x-ratelimit-*` headers of the answer, from the windows as they were last seen."""

    @asynccontextmanager
    async def taken(self, *, tokens_used: Callable[[], int]) -> AsyncIterator[None]:
        """Count the request, and when the block ends its tokens; raise RateLimited if a window is spent."""
        running, most = self._quotas.running, self._limits.concurrent_requests
        if most is not None and running[self._tenant] >= most:
            raise RateLimited(f"rate limit reached: at most {most} requests at a time", retry_after_seconds=1)
        running[self._tenant] += 1
        try:
            await self._admit()
            yield
        finally:
            running[self._tenant] -= 1
            await self._settle(tokens_used())

    async def take_video(self, seconds: float) -> None:
        """Count seconds of video; raise RateLimited, or MediaRefused if they can never fit."""
        limit, cost = self._limits.video_seconds_per_minute, math.ceil(seconds)
        if limit is not None and cost > 0:
            if cost > limit:
                raise MediaRefused(
                    f"the videos last {cost} seconds, more than the {limit} in a minute that this API key may use",
                    param="messages",
                    code="video_too_long",
                )
            await self._take("video-seconds", cost, limit)
        self._count("video_seconds", cost)

    async def _admit(self) -> None:
        limits, checks = self._limits, []
        if limits.requests_per_minute is not None:
            checks.append(self._take("requests", 1, limits.requests_per_minute))
        if limits.tokens_per_minute is not None:
            checks.append(self._check("tokens", 1, limits.tokens_per_minute))
        if limits.video_seconds_per_minute is not None:
            checks.append(self._check("video-seconds", 0, limits.video_seconds_per_minute))
        outcomes = await asyncio.gather(*checks, return_exceptions=True)  # all of them, for the headers
        for outcome in outcomes:
            if outcome is not None:
                raise outcome
        self._count("requests", 1)

    async def _settle(self, tokens: int) -> None:
        if self._limits.tokens_per_minute is not None and tokens > 0:
            await self._quotas.counts.charge(self._key("tokens"), tokens)
        self._count("tokens", tokens)

    async def _take(self, measure: Measure, cost: int, limit: int) -> None:
        fits = await self._quotas.counts.take(self._key(measure), cost, limit=limit)
        await self._check(measure, 0 if fits else cost, limit)

    async def _check(self, measure: Measure, cost: int, limit: int) -> None:
        window = await self._quotas.counts.window(self._key(measure))
        self.headers |= {
            f"x-ratelimit-limit-{measure}": str(limit),
            f"x-ratelimit-remaining-{measure}": str(window.remaining(limit)),
            f"x-ratelimit-reset-{measure}": f"{window.reset_seconds:.3f}s",
        }
        if window.remaining(limit) < cost:
            wait = math.floor(window.seconds_until(cost, limit)) + 1
            what = measure.replace("-", " ")
            raise RateLimited(
                f"rate limit reached: at most {limit} {what} in a minute, try again in {wait} seconds",
                retry_after_seconds=wait,
            )

    def _count(self, unit: str, amount: int) -> None:
        self._quotas.usage.labels(self._tenant or NO_TENANT, unit).inc(amount)

    def _key(self, measure: Measure) -> str:
        return f"{self._tenant}/{measure}"
