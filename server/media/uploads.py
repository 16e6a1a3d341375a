"""The store of uploaded videos: a directory per tenant, with two files per upload, the content and its description.

An upload exists as soon as its description does. The description is written last and atomically, so a crash leaves
nothing but files without a description, which are swept away. Nothing is kept in memory, so several gateways may share
the directory.
"""

import asyncio
import contextlib
import logging
import os
import re
import secrets
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.errors import InvalidRequest, MediaRefused, UnknownFile
from server.media.examine import UPLOAD, Examiner

logger = logging.getLogger(__name__)

MAX_FILES: Final = 10_000  # per tenant, because listing files reads all their names and a page of descriptions
SWEEP_SECONDS: Final = 300.0
ABANDONED_SECONDS: Final = 3600.0  # far longer than any upload takes
WRITE_BYTES: Final = 2**20
ID_PATTERN: Final = r"^file-[0-9a-f]{32}$"
_ID = re.compile(ID_PATTERN)
_CONTENT, _DESCRIPTION, _INCOMING = ".video", ".json", ".incoming-"
_NO_TENANT = "_open"  # no tenant can have this name: tenants' names begin with a letter or digit
_TENANT = re.compile(rf"{_NO_TENANT}|[a-z0-9][a-z0-9._-]*")

Order = Literal["asc", "desc"]
Purpose = Literal["video", "user_data", "vision"]
"""What a client says that a file is for. A file is a video, whatever the purpose."""


class VideoFacts(BaseModel):
    """The facts that the gateway found out about an uploaded video."""

    model_config = ConfigDict(frozen=True)

    media_type: str
    codec: str = ""
    duration_seconds: float
    width: int
    height: int
    frames: int


class FileObject(BaseModel):
    """OpenAI's file object, with the facts about the video in `aot`."""

    model_config = ConfigDict(frozen=True)

    id: Annotated[str, Field(pattern=ID_PATTERN)]
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: Purpose = "video"
    status: Literal["processed"] = "processed"
    aot: VideoFacts


class FilePage(BaseModel):
    """One page of a tenant's files."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Incoming:
    """A file that is being uploaded."""

    def __init__(self, path: Path, descriptor: int, *, max_bytes: int) -> None:
        """Write to the open file `descriptor`, which is at `path`."""
        self.path = path
        self.descriptor = descriptor
        self.size_bytes = 0
        self._max_bytes = max_bytes
        self._waiting = bytearray()

    async def write(self, piece: bytes) -> None:
        """Append `piece`; raise MediaRefused if the file becomes larger than `max_bytes`."""
        self.size_bytes += len(piece)
        if self.size_bytes > self._max_bytes:
            raise MediaRefused(f"the file is larger than {self._max_bytes} bytes", param="file", code="media_too_large")
        self._waiting += piece
        if len(self._waiting) >= WRITE_BYTES:
            await self.flush()

    async def flush(self) -> None:
        """Write the buffered bytes to the file."""
        waiting, self._waiting = self._waiting, bytearray()
        await asyncio.to_thread(_write_all, self.descriptor, waiting)


class FileStore:
    """The uploaded files of all tenants."""

    def __init__(
        self,
        directory: Path,
        *,
        examiner: Examiner,
        max_bytes: int,
        tenant_bytes: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Use `directory` with its present content.

        A file may have at most `max_bytes`, and all files of a tenant together at most `tenant_bytes`.
        """
        self._directory = directory
        self._examiner = examiner
        self.max_bytes = max_bytes
        self._tenant_bytes = tenant_bytes
        self._clock = clock
        self._reserved: Counter[str] = Counter()

    @asynccontextmanager
    async def incoming(self, *, tenant: str, size_bytes: int | None) -> AsyncIterator[Incoming]:
        """Yield a file to write to. It is deleted when the block ends, unless `keep` has made it a file of the tenant.

        `size_bytes` of the tenant's quota are reserved while the block lasts. If the size is unknown (None), the size
        of the largest possible file is reserved. Raises InvalidRequest if the tenant's quota is used up.
        """
        size_bytes = self.max_bytes if size_bytes is None else min(size_bytes, self.max_bytes)
        self._reserved[tenant] += size_bytes
        try:
            folder = await asyncio.to_thread(self._folder_with_room, tenant)
            descriptor, name = await asyncio.to_thread(tempfile.mkstemp, prefix=_INCOMING, dir=folder)
            try:
                yield Incoming(Path(name), descriptor, max_bytes=size_bytes)
            finally:
                _discard(descriptor, name)
        finally:
            self._reserved[tenant] -= size_bytes

    async def keep(
        self,
        incoming: Incoming,
        *,
        tenant: str,
        filename: str,
        expires_after_seconds: int | None,
        purpose: Purpose = "video",
    ) -> FileObject:
        """Make `incoming` a file of the tenant, under a new id; raise MediaRefused if it is not an allowed video."""
        await incoming.flush()
        facts = await self._facts_about(incoming)
        now = self._clock()
        file = FileObject(
            id=f"file-{int(now * 1000):012x}{secrets.token_hex(10)}",  # begins with the time, so that ids sort by age
            bytes=incoming.size_bytes,
            created_at=int(now),
            expires_at=None if expires_after_seconds is None else int(now) + expires_after_seconds,
            filename=filename,
            purpose=purpose,
            aot=facts,
        )
        await asyncio.to_thread(self._commit, incoming, file, tenant)
        return file

    async def get(self, file_id: str, *, tenant: str) -> FileObject:
        """Return the tenant's file; raise UnknownFile if the tenant has no file with this id or it has expired."""
        file = await asyncio.to_thread(self._read, self._folder(tenant), file_id) if _ID.fullmatch(file_id) else None
        if file is None:
            raise UnknownFile(f"there is no file {file_id[:80]!r}", param="file_id")
        return file

    async def path_of(self, file_id: str, *, tenant: str) -> Path:
        """Return the path of the content of the tenant's file; raises UnknownFile as `get` does.

        The file may be deleted before the caller opens it.
        """
        await self.get(file_id, tenant=tenant)
        return self._folder(tenant) / f"{file_id}{_CONTENT}"

    async def page(
        self, *, tenant: str, after: str | None, limit: int, order: Order, purpose: str | None = None
    ) -> FilePage:
        """Return up to `limit` of the tenant's files in the order of their age, beginning after the id `after`.

        With `purpose`, only files that were uploaded for it.
        """
        files = await asyncio.to_thread(self._list, self._folder(tenant), after, limit + 1, order, purpose)
        data = files[:limit]
        return FilePage(
            data=data,
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
            has_more=len(files) > limit,
        )

    async def delete(self, file_id: str, *, tenant: str) -> None:
        """Delete the tenant's file; raises UnknownFile as `get` does."""
        await self.get(file_id, tenant=tenant)
        await asyncio.to_thread(_remove, self._folder(tenant), file_id)

    async def sweep(self) -> None:
        """Delete files that have expired, and the remains of interrupted uploads."""
        await asyncio.to_thread(self._sweep)

    async def watch(self) -> None:
        """Sweep periodically, forever."""
        while True:
            try:
                await self.sweep()
            except OSError:
                logger.exception("files could not be swept")
            await asyncio.sleep(SWEEP_SECONDS)

    def _folder(self, tenant: str) -> Path:
        return self._directory / (tenant or _NO_TENANT)

    def _folder_with_room(self, tenant: str) -> Path:
        folder = self._folder(tenant)
        folder.mkdir(mode=0o700, exist_ok=True)
        sizes = [entry.stat().st_size for entry in os.scandir(folder) if entry.name.endswith(_CONTENT)]
        if sum(sizes) + self._reserved[tenant] > self._tenant_bytes:
            raise InvalidRequest(
                f"your files would exceed your quota of {self._tenant_bytes} bytes: delete some of them",
                param="file",
                code="file_quota_exceeded",
            )
        if len(sizes) >= MAX_FILES:
            raise InvalidRequest(
                f"you have {MAX_FILES} files, the largest number allowed: delete some of them",
                param="file",
                code="file_quota_exceeded",
            )
        return folder

    async def _facts_about(self, incoming: Incoming) -> VideoFacts:
        try:
            with incoming.path.open("rb") as file:
                found = await self._examiner.examine(file.fileno(), kind="video", subject=UPLOAD)
        except MediaRefused as exc:
            exc.param = "file"
            raise
        facts = found.facts
        return VideoFacts(
            media_type=found.type.mime,
            codec=facts.codec,
            duration_seconds=facts.duration_seconds,
            width=facts.width,
            height=facts.height,
            frames=facts.frames,
        )

    def _commit(self, incoming: Incoming, file: FileObject, tenant: str) -> None:
        folder = self._folder(tenant)
        os.fsync(incoming.descriptor)
        incoming.path.replace(folder / f"{file.id}{_CONTENT}")
        descriptor, name = tempfile.mkstemp(prefix=_INCOMING, dir=folder)
        with os.fdopen(descriptor, "wb") as description:
            description.write(file.model_dump_json().encode())
            description.flush()
            os.fsync(descriptor)
        Path(name).replace(folder / f"{file.id}{_DESCRIPTION}")
        _sync_directory(folder)

    def _read(self, folder: Path, file_id: str) -> FileObject | None:
        try:
            file = FileObject.model_validate_json((folder / f"{file_id}{_DESCRIPTION}").read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError:
            logger.error("a file's description can't be read", extra={"file_id": file_id})
            return None
        return None if file.expires_at is not None and file.expires_at <= self._clock() else file

    def _list(self, folder: Path, after: str | None, most: int, order: Order, purpose: str | None) -> list[FileObject]:
        ids = sorted(_ids(folder), reverse=order == "desc")
        if after is not None:
            ids = [file_id for file_id in ids if (file_id < after if order == "desc" else file_id > after)]
        found: list[FileObject] = []
        for file_id in ids:
            if len(found) == most:
                break
            file = self._read(folder, file_id)
            if file is not None and purpose in (None, file.purpose):
                found.append(file)
        return found

    def _sweep(self) -> None:
        for folder in _tenants_folders(self._directory):
            described = set(_ids(folder))
            for file_id in described:
                if self._read(folder, file_id) is None:
                    _remove(folder, file_id)
            for entry in os.scandir(folder):
                stem, dot, suffix = entry.name.partition(".")
                left = entry.name.startswith(_INCOMING) or (dot + suffix == _CONTENT and stem not in described)
                with contextlib.suppress(FileNotFoundError):
                    if left and entry.stat().st_mtime < time.time() - ABANDONED_SECONDS:
                        Path(entry.path).unlink()


def _tenants_folders(directory: Path) -> list[Path]:
    ours = [entry for entry in os.scandir(directory) if _TENANT.fullmatch(entry.name)]
    return [Path(entry.path) for entry in ours if entry.is_dir(follow_symlinks=False)]


def _ids(folder: Path) -> Iterator[str]:
    try:
        names = [entry.name for entry in os.scandir(folder)]
    except FileNotFoundError:
        return
    for name in names:
        stem = name.removesuffix(_DESCRIPTION)
        if stem != name and _ID.fullmatch(stem):
            yield stem


def _remove(folder: Path, file_id: str) -> None:
    """Delete a file. The description is deleted first, because without it the file no longer exists for clients."""
    for suffix in (_DESCRIPTION, _CONTENT):
        (folder / f"{file_id}{suffix}").unlink(missing_ok=True)
    _sync_directory(folder)


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(descriptor: int, name: str) -> None:
    os.close(descriptor)
    Path(name).unlink(missing_ok=True)


def _write_all(descriptor: int, data: bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
