"""`GET /v1/usage`: what a tenant used and saved; `GET /metrics/usage.csv`: the same of all tenants."""

import csv
import io
import re
from dataclasses import dataclass
from datetime import date, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, Field, WithJsonSchema

from server.errors import InvalidRequest, UsageUnavailable
from server.observe.metrics import NO_TENANT
from server.observe.usage import Amounts, Ledger, Place, Rows, day_of, number_of
from server.openapi import refusals
from server.routes.dependencies import TheCaller

USUAL_DAYS = 30
COLUMNS = (
    *("date", "tenant", "model", "requests", "prompt_tokens", "answer_tokens"),
    *("video_tokens_before", "video_tokens_after", "video_tokens_saved", "video_seconds", "prefill_seconds_saved"),
)
DECIMALS = 6
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")

Count = Annotated[int, Field(ge=0)]
Day = Annotated[str | None, WithJsonSchema({"type": "string", "format": "date"})]


@dataclass(frozen=True)
class Asked:
    """The days that a request asks about, as it writes them."""

    first: str | None
    last: str | None
    days: str | None


async def _asked(
    request: Request,
    first: Annotated[
        Day, Query(alias="from", description="the first day, in UTC; usually the 30th from `to` back")
    ] = None,
    last: Annotated[Day, Query(alias="to", description="the last day, in UTC; usually today")] = None,
    days: Annotated[
        Annotated[str | None, WithJsonSchema({"type": "integer", "minimum": 1})],
        Query(description="the last days, today included; instead of `from` and `to`"),
    ] = None,
) -> Asked:
    for name in request.query_params:
        if name not in ("from", "to", "days"):
            raise InvalidRequest(
                f"{name[:80]!r} is not a parameter here; the parameters are from, to, days", param=name[:80]
            )
    return Asked(first, last, days)


WhatIsAsked = Annotated[Asked, Depends(_asked)]


class SavedTokens(BaseModel):
    """Video tokens before and after the reduction, and the difference."""

    before: Count
    after: Count
    saved: Count


class Usage(BaseModel):
    """What requests used and saved."""

    requests: Annotated[Count, Field(description="that an engine has answered, in full or in part")]
    prompt_tokens: Count
    answer_tokens: Count
    video_tokens: SavedTokens
    video_seconds: Annotated[float, Field(ge=0)]
    prefill_seconds_saved: Annotated[float, Field(description="of engines that have measured their prefill")]

    @classmethod
    def fields_of(cls, amounts: Amounts) -> dict[str, Any]:
        """Return the fields for these amounts."""
        before, after = amounts.video_tokens_before, amounts.video_tokens_after
        return {
            "requests": amounts.requests,
            "prompt_tokens": amounts.prompt_tokens,
            "answer_tokens": amounts.answer_tokens,
            "video_tokens": SavedTokens(before=before, after=after, saved=amounts.video_tokens_saved),
            "video_seconds": round(amounts.video_seconds, DECIMALS),
            "prefill_seconds_saved": round(amounts.prefill_seconds_saved, DECIMALS),
        }


class DailyUsage(Usage):
    """The usage of one model on one day in UTC."""

    date: date
    model: str


class UsageReport(BaseModel):
    """A tenant's usage by day and model, the latest day first."""

    object: Literal["usage"] = "usage"
    first: Annotated[date, Field(serialization_alias="from")]
    last: Annotated[date, Field(serialization_alias="to")]
    storage: Annotated[
        Literal["memory", "redis"],
        Field(description="redis: of all gateways, also before their restarts; memory: of this gateway since it began"),
    ]
    since: Annotated[datetime | None, Field(description="when this gateway began to count, if in memory")]
    total: Usage
    data: list[DailyUsage]


def usage_router(ledger: Ledger) -> APIRouter:
    """Return the routes that report what is in the ledger."""
    router = APIRouter()

    @router.get("/v1/usage", responses=refusals(InvalidRequest, UsageUnavailable))
    async def usage(caller: TheCaller, asked: WhatIsAsked) -> UsageReport:
        """Report what the caller's tenant used and saved, by day and model."""
        first, last = _period(asked, today=ledger.today, kept=ledger.days)
        rows = _latest_first(await ledger.rows(first, last, tenant=caller.tenant or NO_TENANT))
        total = Amounts()
        for _, amounts in rows:
            total.add(amounts)
        return UsageReport(
            first=day_of(first),
            last=day_of(last),
            storage="redis" if ledger.is_shared else "memory",
            since=None if ledger.is_shared else ledger.begun,
            total=Usage(**Usage.fields_of(total)),
            data=[DailyUsage(date=at.date, model=at.model, **Usage.fields_of(amounts)) for at, amounts in rows],
        )

    @router.get(
        "/metrics/usage.csv",
        response_class=Response,
        responses={
            200: {
                "description": "A row for each day, tenant and model",
                "content": {"text/csv": {"schema": {"type": "string"}}},
            },
            **{status: refusals(InvalidRequest, UsageUnavailable)[status] for status in (400, 503)},
        },
    )
    async def usage_of_all(asked: WhatIsAsked) -> Response:
        """Report what all tenants used and saved, by day and model."""
        first, last = _period(asked, today=ledger.today, kept=ledger.days)
        rows = await ledger.rows(first, last, tenant=None)
        return Response(_csv(rows), media_type="text/csv")

    return router


def _latest_first(rows: Rows) -> list[tuple[Place, Amounts]]:
    return sorted(rows.items(), key=lambda row: (-row[0].day, row[0].tenant, row[0].model))


def _csv(rows: Rows) -> str:
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(COLUMNS)
    for at, amounts in _latest_first(rows):
        values = (getattr(amounts, name) for name in COLUMNS[3:])
        rounded = (round(value, DECIMALS) if isinstance(value, float) else value for value in values)
        table.writerow((at.date.isoformat(), at.tenant, at.model, *rounded))
    return text.getvalue()


def _period(asked: Asked, *, today: int, kept: int) -> tuple[int, int]:
    """Return the first and the last day that a request asks about, in days since 1970.

    A last day in the future becomes today. Raises InvalidRequest if the days are no days, or are not kept.
    """
    oldest = today - kept + 1
    if asked.days is not None:
        if asked.first is not None or asked.last is not None:
            raise InvalidRequest("days can't be combined with from and to: ask for one or the other", param="days")
        days = int(asked.days) if asked.days.isascii() and asked.days.isdecimal() and len(asked.days) < 6 else 0
        if not 1 <= days <= kept:
            raise InvalidRequest(
                f"days must be a whole number in [1, {kept}], the days that are kept, got {asked.days[:80]!r}",
                param="days",
            )
        return today - days + 1, today
    last = today if asked.last is None else _day(asked.last, "to")
    first = max(oldest, last - USUAL_DAYS + 1) if asked.first is None else _day(asked.first, "from")
    for name, day in (("to", last), ("from", first)):
        if day < oldest:
            raise InvalidRequest(
                f"{name} must not be before {day_of(oldest)}: usage is kept for {kept} days, got {day_of(day)}",
                param=name,
            )
    if first > today:
        raise InvalidRequest(f"from must not be after today, {day_of(today)} in UTC, got {day_of(first)}", param="from")
    if first > last:
        raise InvalidRequest(f"from must not be after to, got {day_of(first)} and {day_of(last)}", param="from")
    return first, min(last, today)


def _day(text: str, name: str) -> int:
    try:
        if _DATE.fullmatch(text) is None:  # ISO 8601 has more forms
            raise ValueError
        return number_of(date.fromisoformat(text))
    except ValueError as exc:
        raise InvalidRequest(f"{name} must be a date such as 2026-11-25, got {text[:80]!r}", param=name) from exc
