"""The tenants' limits: requests, tokens and seconds of video per minute, counted in this process or in Redis."""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable
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
REDIS_SECONDS: Final = 0.5  # time-out of a connection, and of an answer
REDIS_PAUSE_SECONDS: Final = 5.0  # after a failure, so that not every request waits for the time-out

T = TypeVar("T")
Measure = Literal["requests", "tokens", "video-seconds"]
Storage = MemoryStorage | RedisStorage


@dataclass(frozen=True)
class Window:
    """A window that begins with what is counted in it first, and ends a period later, whatever is counted until then.

    `used` is the count, and `seconds` the time until it ends.
    """

    used: int
    seconds: float

    def remaining(self, limit: int) -> int:
        """Return how much of `limit` is left."""
        return max(0, limit - self.used)

    def seconds_until(self, cost: int, limit: int) -> float:
        """Return the time until `cost` (at most `limit`) fits, provided that nothing else is counted until then."""
        return 0.0 if cost <= self.remaining(limit) else self.seconds

    @property
    def reset_seconds(self) -> float:
        """The time until the full limit is available again."""
        return self.seconds if self.used else 0.0


class Counts:
    """Windows in a shared storage. Without one, or while it can't be reached, they are in this process."""

    def __init__(self, shared: RedisStorage | None, *, metrics: Metrics, period_seconds: int = MINUTE_SECONDS) -> None:
        """Start with the counts of the shared storage, if there is one."""
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
        """Count `cost` in the window `key` if it fits into `limit`; return whether it did."""
        return await self._in(lambda storage: self._take(storage, key, cost, limit))

    async def charge(self, key: str, cost: int) -> None:
        """Count a cost that was spent already, even beyond the limit."""
        await self._in(lambda storage: storage.incr(key, self._period_seconds, amount=cost))

    async def window(self, key: str) -> Window:
        """Return the state of the window `key`."""
        return await self._in(lambda storage: self._window(storage, key))

    async def _take(self, storage: Storage, key: str, cost: int, limit: int) -> bool:
        if await storage.get(key) + cost > limit:
            return False
        if await storage.incr(key, self._period_seconds, amount=cost) <= limit:
            return True
        await storage.incr(key, self._period_seconds, amount=-cost)  # another request was counted in between
        return False

    async def _window(self, storage: Storage, key: str) -> Window:
        used = await storage.get(key)
        seconds = await storage.get_expiry(key) - time.time()
        return Window(used, min(max(0.0, seconds), float(self._period_seconds)))

    async def close(self) -> None:
        """Close the connections to the shared storage."""
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
    """Return the storage at a Redis URL, or None for `memory`.

    Raises ConfigurationError if the Redis client is not installed.
    """
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
            retry=Retry(NoBackoff(), 1),  # type: ignore[arg-type] # one retry: an idle connection may be stale
        )
    except (ImportError, MissingPackage) as exc:
        raise ConfigurationError("limits in Redis need its client: pip install redis") from exc


class Quotas:
    """The limits of all tenants, and how much of them is used."""

    def __init__(self, *, limits_of: Callable[[str], Limits], counts: Counts, metrics: Metrics) -> None:
        """Look up a tenant's limits with `limits_of`."""
        self._limits_of = limits_of
        self.counts = counts
        self.usage = metrics.tenant_usage
        self.running: Counter[str] = Counter()

    def allowance(self, tenant: str) -> "Allowance":
        """Return the allowance of one request of `tenant`."""
        return Allowance(self, tenant, self._limits_of(tenant))


class Allowance:
    """What one request takes from its tenant's limits."""

    def __init__(self, quotas: Quotas, tenant: str, limits: Limits) -> None:
        """Start with nothing taken."""
        self._quotas = quotas
        self._tenant = tenant
        self._limits = limits
        self._is_running = False
        self.headers: dict[str, str] = {}
        """The `x-ratelimit-*` headers of the answer, from the latest state of the windows."""

    async def enter(self) -> None:
        """Count the request; raise RateLimited if a limit is used up. Call `leave` when it is over, in either case."""
        running, most = self._quotas.running, self._limits.concurrent_requests
        if most is not None and running[self._tenant] >= most:
            raise RateLimited(f"rate limit reached: at most {most} requests at a time", retry_after_seconds=1)
        running[self._tenant] += 1
        self._is_running = True
        await self._admit()

    async def leave(self, *, tokens: int) -> None:
        """Count the tokens that the request has used."""
        if self._is_running:
            self._is_running = False
            self._quotas.running[self._tenant] -= 1
            await self._settle(tokens)

    async def take_video(self, seconds: float) -> None:
        """Count seconds of video, rounded up.

        Raises RateLimited if they do not fit now, and MediaRefused if they exceed the limit by themselves.
        """
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

    def note_refused(self) -> None:
        """Count the request among those that were refused for a limit."""
        self._count("rate_limited", 1)

    async def _admit(self) -> None:
        """Take one from the limit on requests, unless another limit is used up: a refusal costs nothing."""
        limits, checks = self._limits, []
        if limits.tokens_per_minute is not None:
            checks.append(self._check("tokens", 1, limits.tokens_per_minute))
        if limits.video_seconds_per_minute is not None:
            checks.append(self._check("video-seconds", 0, limits.video_seconds_per_minute))
        # All checks run, because each sets its headers.
        outcomes = await asyncio.gather(*checks, return_exceptions=True) if checks else ()
        refusal = next((outcome for outcome in outcomes if outcome is not None), None)
        if limits.requests_per_minute is not None:
            if refusal is None:
                await self._take("requests", 1, limits.requests_per_minute)
            else:
                await self._check("requests", 0, limits.requests_per_minute)
        if refusal is not None:
            raise refusal
        self._count("requests", 1)

    async def _settle(self, tokens: int) -> None:
        if self._limits.tokens_per_minute is not None and tokens > 0:
            await self._quotas.counts.charge(self._key("tokens"), tokens)
        self._count("tokens", tokens)

    async def _take(self, measure: Measure, cost: int, limit: int) -> None:
        fits = await self._quotas.counts.take(self._key(measure), cost, limit=limit)
        await self._check(measure, 0 if fits else cost, limit)
        if not fits:  # the window has moved on in between, and there is room now
            await self._quotas.counts.charge(self._key(measure), cost)

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
