"""FastAPI dependencies of the endpoints: the caller of a request, and its record."""

from typing import Annotated

from fastapi import Depends, Request

from server.admission.auth import Caller
from server.edge.state import caller_of, record_of
from server.observe.record import RequestRecord


async def _caller(request: Request) -> Caller:
    return caller_of(request.scope)


async def _record(request: Request) -> RequestRecord:
    return record_of(request.scope)


TheCaller = Annotated[Caller, Depends(_caller)]
TheRecord = Annotated[RequestRecord, Depends(_record)]
