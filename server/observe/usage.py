"""The usage ledger: what each tenant used and saved, by UTC day and model, in this process or in a shared Redis."""

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import astuple, dataclass, fields
from datetime import UTC, date, datetime
from itertools import islice
from typing import Any, Final, NamedTuple, Self
from uuid import uuid4

from server.errors import UsageUnavailable
from server.observe.metrics import NO_TENANT, Metrics
from server.observe.record import RequestRecord

logger = logging.getLogger(__name__)

DAY_SECONDS: Final = 24 * 3600
SAVE_SECONDS: Final = 1.0  # between two batches: as much as a gateway that is killed can lose
PAUSE_SECONDS: Final = 2.0  # after a failure, so that not every question about usage waits for the time-out
BATCH_ROWS: Final = 200
LAST_LINES: Final = 100  # of the log, about rows that a gateway can't save before it ends
PREFIX: Final = "aot-gateway:usage"

_EPOCH: Final = date(1970, 1, 1).toordinal()
_ADD_ONCE: Final = """
if not redis.call('SET', KEYS[1], '1', 'NX', 'EX', ARGV[1]) then return 0 end
for i = 2, #ARGV, 4 do
  local key = KEYS[tonumber(ARGV[i])]
  if ARGV[i + 2] == '' then redis.call('SADD', key, ARGV[i + 1])
  else redis.call('HINCRBYFLOAT', key, ARGV[i + 1], ARGV[i + 2]) end
  redis.call('EXPIREAT', key, ARGV[i + 3])
end
return 1
"""
"""Adds a batch, unless it has been added: whoever sent it may not have learned of it, and send it again."""


@dataclass
class Amounts:
    """What requests used and saved. A request counts once an engine has answered it, in full or in part."""

    requests: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    video_tokens_before: int = 0
    video_tokens_after: int = 0
    video_seconds: float = 0.0
    prefill_seconds_saved: float = 0.0

    @classmethod
    def of(cls, record: RequestRecord) -> Self:
        """Return what one request used. Of an answer that was cut short, only what arrived counts."""
        before, after = record.video_tokens or (0, 0)
        prompt = record.prompt_tokens
        prompt = min(after, record.tokens) if prompt is None else prompt
        whole, reduced = record.prefill_seconds or (0.0, 0.0)
        return cls(1, prompt, max(0, record.tokens - prompt), before, after, record.video_seconds, whole - reduced)

    def add(self, other: Self) -> None:
        """Add the amounts of `other`."""
        for name in MEASURES:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def video_tokens_saved(self) -> int:
        """The video tokens that engines did not have to process."""
        return self.video_tokens_before - self.video_tokens_after


MEASURES: Final = tuple(field.name for field in fields(Amounts))


class Place(NamedTuple):
    """Where amounts are counted: a day since 1970, a tenant (`none` without tenants), and a model."""

    day: int
    tenant: str
    model: str

    @property
    def date(self) -> date:
        """The day in UTC."""
        return day_of(self.day)


Rows = dict[Place, Amounts]


def today(seconds: float | None = None) -> int:
    """Return the day in UTC at a time, by default now, in days since 1970."""
    return int((time.time() if seconds is None else seconds) // DAY_SECONDS)


def day_of(number: int) -> date:
    """Return the date of a day since 1970."""
    return date.fromordinal(_EPOCH + number)


def number_of(day: date) -> int:
    """Return a date as days since 1970."""
    return day.toordinal() - _EPOCH


class RedisUsage:
    """The rows of all gateways, in Redis: a hash for each day and tenant, and a set of each day's tenants."""

    def __init__(self, client: Any, *, failures: tuple[type[Exception], ...], days: int) -> None:
        """Use an asyncio client of Redis, which raises `failures`. Rows expire after `days` days."""
        self._client = client
        self._days = days
        self.failures = failures

    async def add(self, batch_id: str, rows: Rows) -> None:
        """Add rows, once however often this batch is sent within a day."""
        keys, arguments = [f"{PREFIX}:batch:{batch_id}"], [str(DAY_SECONDS)]
        index: dict[str, int] = {}

        def write(key: str, member: str, amount: str, expires: int) -> None:
            if key not in index:
                keys.append(key)
                index[key] = len(keys)
            arguments.extend((str(index[key]), member, amount, str(expires)))

        for place, amounts in rows.items():
            expires = (place.day + self._days) * DAY_SECONDS
            write(_key(place.day), place.tenant, "", expires)
            for measure, amount in zip(MEASURES, astuple(amounts), strict=True):
                if amount:
                    write(_key(place.day, place.tenant), f"{measure}:{place.model}", repr(amount), expires)
        await self._client.eval(_ADD_ONCE, len(keys), *keys, *arguments)

    async def rows(self, days: range, tenant: str | None) -> Rows:
        """Return the rows of these days, of one tenant or of all."""
        if tenant is not None:
            places = [(day, tenant) for day in days]
        else:
            present = await self._piped("smembers", [_key(day) for day in days])
            places = [(day, name) for day, names in zip(days, present, strict=True) for name in names]
        found: Rows = defaultdict(Amounts)
        hashes = await self._piped("hgetall", [_key(*place) for place in places])
        for (day, name), counted in zip(places, hashes, strict=True):
            for member, amount in counted.items():
                measure, _, model = member.partition(":")
                if measure in MEASURES:  # another version of the gateway may count more
                    kind = type(getattr(Amounts, measure))
                    setattr(found[Place(day, name, model)], measure, kind(float(amount)))
        return dict(found)

    async def _piped(self, command: str, keys: Iterable[str]) -> list[Any]:
        async with self._client.pipeline(transaction=False) as pipeline:
            for key in keys:
                getattr(pipeline, command)(key)
            answers: list[Any] = await pipeline.execute()
        return answers

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()


def _key(day: int, tenant: str | None = None) -> str:
    key = f"{PREFIX}:{day_of(day).isoformat()}"
    return key if tenant is None else f"{key}:{tenant}"


class Ledger:
    """What tenants used. With Redis, rows wait here until they are saved there, in batches.

    Memory is bounded by days, tenants and models: rows of one place are added up, and old ones are dropped.
    """

    def __init__(
        self, shared: RedisUsage | None, *, days: int, metrics: Metrics, clock: Callable[[], float] = time.time
    ) -> None:
        """Keep the rows of `days` days, today's included."""
        self.days = days
        self.begun = datetime.now(UTC)
        self._shared = shared
        self._clock = clock
        self._unsaved_requests = metrics.usage_unsaved_requests
        self._rows: Rows = {}
        self._batch: tuple[str, Rows] | None = None
        """The rows that are on their way to Redis. They stay as they are until Redis has them."""
        self._saving = asyncio.Lock()
        self._lost = False
        self._resume = 0.0

    @property
    def is_shared(self) -> bool:
        """Whether the rows are in Redis, so that they outlive this process and are those of all gateways."""
        return self._shared is not None

    @property
    def today(self) -> int:
        """The current day in UTC, in days since 1970."""
        return today(self._clock())

    def count(self, record: RequestRecord, *, tenant: str) -> None:
        """Count a request that has ended, if an engine answered it."""
        if record.tokens:
            place = Place(self.today, tenant or NO_TENANT, record.model)
            self._rows.setdefault(place, Amounts()).add(Amounts.of(record))

    async def rows(self, first: int, last: int, *, tenant: str | None) -> Rows:
        """Return the rows from the day `first` to `last`, of one tenant or of all.

        Raises UsageUnavailable if they are in Redis and it can't be reached.
        """
        if self._shared is None:
            self._drop_old()
            return {
                place: amounts
                for place, amounts in self._rows.items()
                if first <= place.day <= last and tenant in (None, place.tenant)
            }
        if not await self.save():
            raise UsageUnavailable("the usage can't be read at the moment, try again later")
        try:
            found = await self._shared.rows(range(first, last + 1), tenant)
        except self._shared.failures as exc:
            self._note(lost=True, failure=type(exc).__name__)
            raise UsageUnavailable("the usage can't be read at the moment, try again later") from exc
        self._note(lost=False)
        return found

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Save and drop rows periodically until the block ends, and once more then."""
        task = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            if self._shared is not None:
                self._resume = 0.0
                if not await self.save():
                    self._tell_unsaved()
                await self._shared.close()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(SAVE_SECONDS)
            self._drop_old()
            await self.save()

    async def save(self) -> bool:
        """Send all rows to Redis, if there is one; return whether it has them."""
        if self._shared is None:
            return True
        async with self._saving:
            if time.monotonic() < self._resume:
                self._count_unsaved()
                return False
            while self._batch or self._rows:
                if self._batch is None:
                    rows = {place: self._rows[place] for place in islice(self._rows, BATCH_ROWS)}
                    self._batch = (uuid4().hex, rows)
                    for place in rows:
                        del self._rows[place]
                try:
                    await self._shared.add(*self._batch)
                except self._shared.failures as exc:
                    self._note(lost=True, failure=type(exc).__name__)
                    return False
                self._batch = None
                self._note(lost=False)
            return True

    def _note(self, *, lost: bool, failure: str | None = None) -> None:
        if lost and not self._lost:
            logger.error("the usage can't be saved: it is kept here and sent again", extra={"failure": failure})
        elif self._lost and not lost:
            logger.info("the usage is saved again")
        self._lost = lost
        self._resume = time.monotonic() + PAUSE_SECONDS if lost else 0.0
        self._count_unsaved()

    def _count_unsaved(self) -> None:
        self._unsaved_requests.set(sum(amounts.requests for _, amounts in self._unsaved()))

    def _unsaved(self) -> Iterator[tuple[Place, Amounts]]:
        if self._batch is not None:
            yield from self._batch[1].items()
        yield from self._rows.items()

    def _drop_old(self) -> None:
        """Drop the rows that are older than the ledger keeps; say so if they were not saved."""
        oldest = self.today - self.days + 1
        old = [place for place in self._rows if place.day < oldest]
        for place in old:
            amounts = self._rows.pop(place)
            if self._shared is not None:
                _tell(place, amounts)

    def _tell_unsaved(self) -> None:
        rows = list(self._unsaved())
        for place, amounts in rows[:LAST_LINES]:
            _tell(place, amounts)
        if len(rows) > LAST_LINES:
            requests = sum(amounts.requests for _, amounts in rows[LAST_LINES:])
            logger.error("more usage was not saved", extra={"requests": requests})


def _tell(place: Place, amounts: Amounts) -> None:
    counted = {name: getattr(amounts, name) for name in MEASURES}
    where = {"date": place.date.isoformat(), "tenant": place.tenant, "model": place.model}
    logger.error("usage was not saved", extra={**where, **counted})


def shared_usage(backend: str, *, seconds: float, days: int) -> RedisUsage | None:
    """Return the usage at a Redis URL, None for `memory`. Redis has `seconds` to connect, and again to answer."""
    if backend == "memory":
        return None
    from redis.asyncio import Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
    from redis.exceptions import RedisError

    client = Redis.from_url(
        backend,
        decode_responses=True,
        socket_connect_timeout=seconds,
        socket_timeout=seconds,
        retry=Retry(NoBackoff(), 1),
    )
    return RedisUsage(client, failures=(OSError, RedisError), days=days)
