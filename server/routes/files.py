"""`/v1/files`: videos that a client uploads once and uses in many requests."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.json_schema import SkipJsonSchema
from starlette.responses import FileResponse
from starlette.types import Receive, Scope, Send

from server.edge.body import declared_length
from server.edge.forms import read_form
from server.errors import BodyTimeout, BodyTooLarge, InvalidRequest, MediaRefused, RouteNotFound, UnknownFile
from server.media.uploads import ID_PATTERN, FileObject, FilePage, FileStore, Order, Purpose
from server.openapi import refusals
from server.routes.dependencies import TheCaller, TheRecord

PATH = "/v1/files"
PURPOSES = get_args(Purpose)
MAX_PAGE = 10_000
SHORTEST_SECONDS, LONGEST_SECONDS = 3600, 30 * 24 * 3600  # until a file expires; OpenAI's bounds
MAX_FILENAME_CHARACTERS = 255
_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"
_RULES = {
    "purpose": f"must be one of {', '.join(PURPOSES)}",
    "expires_after.anchor": "must be 'created_at'",
    "expires_after.seconds": f"must be a whole number in [{SHORTEST_SECONDS}, {LONGEST_SECONDS}]",
}


def _without_default(schema: dict[str, Any]) -> None:
    schema.pop("default", None)


class UploadFields(BaseModel):
    """The form fields of an upload, besides the file."""

    model_config = ConfigDict(
        extra="forbid",
        title="Upload",
        json_schema_extra={"dependentRequired": {_ANCHOR: [_SECONDS], _SECONDS: [_ANCHOR]}},
    )

    purpose: Purpose
    anchor: Annotated[
        Literal["created_at"] | SkipJsonSchema[None], Field(alias=_ANCHOR, json_schema_extra=_without_default)
    ] = None
    seconds: Annotated[
        Annotated[int, Field(ge=SHORTEST_SECONDS, le=LONGEST_SECONDS)] | SkipJsonSchema[None],
        Field(alias=_SECONDS, json_schema_extra=_without_default),
    ] = None

    @classmethod
    def read(cls, fields: dict[str, str]) -> "UploadFields":
        """Return the validated fields of a form; raise InvalidRequest if one is unknown, missing or wrong."""
        try:
            read = cls.model_validate(fields)
        except ValidationError as exc:
            error = exc.errors()[0]
            name = str(error["loc"][0])
            if error["type"] == "extra_forbidden":
                known = ", ".join(("file", "purpose", _ANCHOR, _SECONDS))
                raise InvalidRequest(f"{name[:80]!r} is not a field of an upload; the fields are {known}") from exc
            raise _wrong(name, fields.get(name, "")) from exc
        if (read.anchor is None) != (read.seconds is None):
            raise _wrong(_ANCHOR if read.anchor is None else _SECONDS, "")
        return read


def _wrong(field: str, given: str) -> InvalidRequest:
    name = field.replace("[", ".").rstrip("]")
    return InvalidRequest(f"{name} {_RULES[name]}, got {given[:80]!r}", param=name)


def _form_schema() -> dict[str, Any]:
    schema = UploadFields.model_json_schema()
    file = {"type": "string", "contentMediaType": "application/octet-stream"}
    return {
        **schema,
        "properties": {"file": file, **schema["properties"]},
        "required": ["file", *schema["required"]],
    }


class DeletedFile(BaseModel):
    """The confirmation that a file has been deleted."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class WholeFile(FileResponse):
    """A response with the whole file. Range headers of the request are ignored."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        del self.headers["accept-ranges"]
        try:
            await super().__call__({**scope, "headers": []}, receive, send)
        except RuntimeError as exc:  # Starlette's word for a file that has been deleted since it was looked up
            raise UnknownFile("the file has been deleted", param="file_id") from exc


@dataclass(frozen=True)
class Files:
    """The endpoints over a file store. Without a store, every endpoint answers 404."""

    store: FileStore | None
    body_seconds: float

    @property
    def router(self) -> APIRouter:
        """The routes of the endpoints."""
        router = APIRouter(prefix=PATH)
        router.add_api_route(
            "",
            self.create_file,
            methods=["POST"],
            responses=refusals(InvalidRequest, MediaRefused, RouteNotFound, BodyTooLarge, BodyTimeout),
            openapi_extra={
                "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _form_schema()}}}
            },
        )
        router.add_api_route("", self.list_files, responses=refusals(InvalidRequest, RouteNotFound))
        unknown = refusals(UnknownFile, RouteNotFound)
        router.add_api_route("/{file_id}", self.retrieve_file, responses=unknown)
        router.add_api_route("/{file_id}", self.delete_file, methods=["DELETE"], responses=unknown)
        router.add_api_route(
            "/{file_id}/content",
            self.retrieve_file_content,
            response_class=WholeFile,
            responses={**unknown, 200: {"description": "The video", "content": {"video/*": {}}}},
        )
        return router

    async def create_file(self, request: Request, caller: TheCaller, record: TheRecord) -> FileObject:
        """Upload a video for later requests."""
        files = self._files()
        size_bytes = declared_length(request.headers)
        async with files.incoming(tenant=caller.tenant, size_bytes=size_bytes) as incoming:
            form = await read_form(
                request.headers,
                request.receive,
                incoming.write,
                file_field="file",
                max_file_bytes=files.max_bytes,
                seconds=self.body_seconds,
            )
            fields = UploadFields.read(form.fields)
            with record.phase("probe"):
                return await files.keep(
                    incoming,
                    tenant=caller.tenant,
                    filename=_clean(form.filename or ""),
                    expires_after_seconds=fields.seconds,
                    purpose=fields.purpose,
                )

    async def list_files(
        self,
        caller: TheCaller,
        after: Annotated[str | None, Query(pattern=ID_PATTERN)] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = MAX_PAGE,
        order: Order = "desc",
        purpose: str | None = None,
    ) -> FilePage:
        """List the tenant's files by age, by default the newest first."""
        files = self._files()
        if purpose not in (None, *PURPOSES):
            return FilePage(data=[], first_id=None, last_id=None, has_more=False)
        return await files.page(tenant=caller.tenant, after=after, limit=limit, order=order, purpose=purpose)

    async def retrieve_file(self, file_id: str, caller: TheCaller) -> FileObject:
        """Return the description of a file."""
        return await self._files().get(file_id, tenant=caller.tenant)

    async def delete_file(self, file_id: str, caller: TheCaller) -> DeletedFile:
        """Delete a file."""
        await self._files().delete(file_id, tenant=caller.tenant)
        return DeletedFile(id=file_id)

    async def retrieve_file_content(self, file_id: str, caller: TheCaller) -> WholeFile:
        """Return the video as it was uploaded."""
        files = self._files()
        file = await files.get(file_id, tenant=caller.tenant)
        path = await files.path_of(file_id, tenant=caller.tenant)
        return WholeFile(path, media_type=file.aot.media_type, filename=file.filename)

    def _files(self) -> FileStore:
        if self.store is None:
            raise RouteNotFound("this gateway keeps no files: AOT_GATEWAY_FILES_DIR is not set", code="files_disabled")
        return self.store


def _clean(filename: str) -> str:
    """Return the last component of a file name, without unprintable characters."""
    last = filename.replace("\\", "/").rpartition("/")[2]
    return "".join(character for character in last if character.isprintable())[:MAX_FILENAME_CHARACTERS] or "video"
