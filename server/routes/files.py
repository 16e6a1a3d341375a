"""`/v1/files`: videos that are sent once and used in many requests."""

import re
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel
from starlette.responses import FileResponse
from starlette.types import Receive, Scope, Send

from server.edge.body import declared_length
from server.edge.forms import read_form
from server.errors import BodyTimeout, BodyTooLarge, InvalidRequest, MediaRefused, RouteNotFound, UnknownFile
from server.media.uploads import ID_PATTERN, FileObject, FilePage, FileStore, Order
from server.observe.record import STATE_KEY, RequestRecord
from server.openapi import refusals

PATH = "/v1/files"
PURPOSE = "video"
MAX_PAGE = 10_000
SHORTEST_SECONDS, LONGEST_SECONDS = 3600, 30 * 24 * 3600  # until a file expires, as with OpenAI
MAX_FILENAME_CHARACTERS = 255
_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"
_DIGITS = re.compile(r"[0-9]{1,10}")
_FIELDS = ("purpose", _ANCHOR, _SECONDS)

UPLOAD = {
    "type": "object",
    "properties": {
        "file": {"type": "string", "contentMediaType": "application/octet-stream"},
        "purpose": {"const": PURPOSE},
        _ANCHOR: {"const": "created_at"},
        _SECONDS: {"type": "integer", "minimum": SHORTEST_SECONDS, "maximum": LONGEST_SECONDS},
    },
    "required": ["file", "purpose"],
    "dependentRequired": {_ANCHOR: [_SECONDS], _SECONDS: [_ANCHOR]},
    "additionalProperties": False,
}


class DeletedFile(BaseModel):
    """A file that is no more."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class WholeFile(FileResponse):
    """A file from its begin to its end, whatever part of it the request asks for."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        del self.headers["accept-ranges"]
        await super().__call__({**scope, "headers": []}, receive, send)


def files_router(store: FileStore | None, *, body_seconds: float) -> APIRouter:
    """Return the routes over `store`; without one there are no files."""
    router = APIRouter()

    def begin(request: Request, route: str) -> tuple[FileStore, RequestRecord]:
        record: RequestRecord = request.scope["state"][STATE_KEY]
        record.route = route
        if store is None:
            raise RouteNotFound("this gateway keeps no files: AOT_GATEWAY_FILES_DIR is not set", code="files_disabled")
        return store, record

    @router.post(
        PATH,
        responses=refusals(InvalidRequest, MediaRefused, RouteNotFound, BodyTooLarge, BodyTimeout),
        openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": UPLOAD}}}},
    )
    async def create_file(request: Request) -> FileObject:
        files, record = begin(request, PATH)
        size_bytes = declared_length(request.headers)
        async with files.incoming(tenant=record.tenant, size_bytes=size_bytes) as incoming:
            form = await read_form(
                request.headers,
                request.receive,
                incoming.write,
                file_field="file",
                max_file_bytes=files.max_bytes,
                seconds=body_seconds,
            )
            expires_after_seconds = _expiry(form.fields)
            with record.phase("probe"):
                return await files.keep(
                    incoming,
                    tenant=record.tenant,
                    filename=_clean(form.filename or ""),
                    expires_after_seconds=expires_after_seconds,
                )

    @router.get(PATH, responses=refusals(InvalidRequest, RouteNotFound))
    async def list_files(
        request: Request,
        after: Annotated[str | None, Query(pattern=ID_PATTERN)] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = MAX_PAGE,
        order: Order = "desc",
        purpose: str | None = None,
    ) -> FilePage:
        files, record = begin(request, PATH)
        if purpose not in (None, PURPOSE):
            return FilePage(data=[], first_id=None, last_id=None, has_more=False)
        return await files.page(tenant=record.tenant, after=after, limit=limit, order=order)

    @router.get(PATH + "/{file_id}", responses=refusals(UnknownFile, RouteNotFound))
    async def retrieve_file(file_id: str, request: Request) -> FileObject:
        files, record = begin(request, PATH + "/{id}")
        return await files.get(file_id, tenant=record.tenant)

    @router.delete(PATH + "/{file_id}", responses=refusals(UnknownFile, RouteNotFound))
    async def delete_file(file_id: str, request: Request) -> DeletedFile:
        files, record = begin(request, PATH + "/{id}")
        await files.delete(file_id, tenant=record.tenant)
        return DeletedFile(id=file_id)

    @router.get(
        PATH + "/{file_id}/content",
        response_class=WholeFile,
        responses=refusals(UnknownFile, RouteNotFound)
        | {200: {"description": "The video", "content": {"video/*": {}}}},
    )
    async def retrieve_file_content(file_id: str, request: Request) -> WholeFile:
        files, record = begin(request, PATH + "/{id}/content")
        file = await files.get(file_id, tenant=record.tenant)
        path = await files.path_of(file_id, tenant=record.tenant)
        return WholeFile(path, media_type=file.aot.media_type, filename=file.filename)

    return router


def _expiry(fields: dict[str, str]) -> int | None:
    """Return the seconds after which the file expires, None for never; raise InvalidRequest if a field is wrong."""
    for name in fields:
        if name not in _FIELDS:
            raise InvalidRequest(f"{name[:80]!r} is no field of an upload; it has file, {', '.join(_FIELDS)}")
    if fields.get("purpose") != PURPOSE:
        raise InvalidRequest(f"purpose must be {PURPOSE!r}, got {fields.get('purpose', '')[:80]!r}", param="purpose")
    anchor, seconds = fields.get(_ANCHOR), fields.get(_SECONDS)
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InvalidRequest("expires_after.anchor must be 'created_at'", param="expires_after.anchor")
    if seconds is None or not _DIGITS.fullmatch(seconds) or not SHORTEST_SECONDS <= int(seconds) <= LONGEST_SECONDS:
        raise InvalidRequest(
            f"expires_after.seconds must be a whole number in [{SHORTEST_SECONDS}, {LONGEST_SECONDS}]",
            param="expires_after.seconds",
        )
    return int(seconds)


def _clean(filename: str) -> str:
    """Return the last part of a file's name, without what can't be printed."""
    last = filename.replace("\\", "/").rpartition("/")[2]
    return "".join(character for character in last if character.isprintable())[:MAX_FILENAME_CHARACTERS] or "video"
