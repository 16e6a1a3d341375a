"""From the media of a request to what its engine may read."""

import asyncio
import hashlib
import hmac
import mmap
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import pybase64

from server.admission.buffers import Buffer
from server.errors import GatewayError, InvalidRequest, MediaRefused
from server.media.facts import Facts, ProbeError
from server.media.fetch import Fetcher
from server.media.file import COPY_BYTES, MediaFile, in_memory, on_disk, too_large
from server.media.identify import HEAD_BYTES, FileType, identify
from server.media.part import Kind, MediaPart
from server.media.probe import Prober
from server.media.share import Shared
from server.media.store import MediaStore
from server.media.threads import off_loop
from server.observe.metrics import Metrics
from server.observe.record import RequestRecord

MAX_MEDIA = 64  # in a request; each costs a probe
MAX_VIDEOS = 16
REMEMBERED_FACTS = 4096
_DATA_URL = re.compile(r"data:(video|image|audio)/([a-z0-9.+-]+);base64,", re.IGNORECASE)
_INVALID: dict[Kind, str] = {"video": "invalid_video", "image": "invalid_image", "audio": "invalid_audio"}
_HEAD_CHARACTERS = 128
_DECODED_CHARACTERS = 2**20  # at a time; a multiple of four


class Uploads(Protocol):
    """Files that clients sent beforehand."""

    async def path_of(self, file_id: str, *, tenant: str) -> Path:
        """Return where the tenant's file is; raise a GatewayError if there is none of that name."""


@dataclass(frozen=True)
class Clip:
    """A medium that was identified and probed."""

    file: MediaFile
    type: FileType
    facts: Facts
    url: str = field(repr=False)
    """A data URL; empty for what goes through the store."""


@dataclass
class _Tally:
    """What the media of one request come to."""

    num_videos: int = 0
    size_bytes: int = 0
    decoded_bytes: int = 0
    digests: list[str] = field(default_factory=list)

    def media_key(self) -> str | None:
        if len(self.digests) < 2:
            return self.digests[0] if self.digests else None
        return hashlib.sha256("".join(self.digests).encode()).hexdigest()


class Intake:
    """Takes in the media of requests. Without a store, engines are given data URLs."""

    def __init__(
        self,
        *,
        fetcher: Fetcher,
        prober: Prober,
        store: MediaStore | None,
        uploads: Uploads | None,
        max_bytes: int,
        max_decoded_bytes: int,
        secret: bytes,
        metrics: Metrics,
    ) -> None:
        """Bound the media of a request, each and together, by `max_bytes`, and by what they make an engine decode.

        `secret` makes the names that engines know videos by: nobody without it can tell or forge another's.
        """
        self._fetcher = fetcher
        self._prober = prober
        self._store = store
        self._uploads = uploads
        self._max_bytes = max_bytes
        self._max_decoded_bytes = max_decoded_bytes
        self._secret = secret
        self._metrics = metrics
        self._downloads: Shared[Clip] = Shared()
        self._facts: dict[tuple[Kind, str], Facts] = {}

    @asynccontextmanager
    async def taken(self, media: Sequence[MediaPart], record: RequestRecord, buffer: Buffer) -> AsyncIterator[None]:
        """Check each medium and put in its place what the engine may read; files last until the block ends.

        Writes down in `record` what the videos are and how long. What is fetched to stand in the request is held in
        `buffer`. Raises MediaRefused, with the place as `param`, and Overloaded if something has no room.
        """
        tally = _Tally()
        async with AsyncExitStack() as files:
            for place, part in enumerate(media):  # in turn: they are few, and one at a time bounds the memory
                try:
                    if place >= MAX_MEDIA:
                        raise MediaRefused(f"at most {MAX_MEDIA} media are taken in a request")
                    await self._take(part, record, buffer, files, tally)
                except MediaRefused as exc:
                    raise MediaRefused(exc.message, param=part.param, code=exc.code) from exc
            record.media_key = tally.media_key()
            yield

    async def _take(
        self, part: MediaPart, record: RequestRecord, buffer: Buffer, files: AsyncExitStack, tally: _Tally
    ) -> None:
        if part.kind == "video":
            tally.num_videos += 1
            if tally.num_videos > MAX_VIDEOS:
                raise MediaRefused(f"at most {MAX_VIDEOS} videos are taken in a request")
        async with self._clip(part, record) as clip:
            if clip.url != part.value:
                buffer.grow(len(clip.url))
            tally.size_bytes += clip.file.size_bytes
            if tally.size_bytes > self._max_bytes:
                raise MediaRefused(
                    f"the media of the request are larger than {self._max_bytes} bytes", code="media_too_large"
                )
            tally.decoded_bytes += clip.facts.decoded_bytes
            if tally.decoded_bytes > self._max_decoded_bytes:
                raise MediaRefused(
                    f"the media of the request take {tally.decoded_bytes} bytes when decoded, "
                    f"at most {self._max_decoded_bytes} are allowed",
                    code="media_too_large",
                )
            if part.kind == "video":
                await self._hand_over_video(part, clip, record, files)
                tally.digests.append(clip.file.digest)
            elif part.source == "url":
                part.replace(clip.url)
            else:
                part.is_plain = True

    async def _hand_over_video(self, part: MediaPart, clip: Clip, record: RequestRecord, files: AsyncExitStack) -> None:
        url = clip.url
        if self._store is not None:
            url = (await files.enter_async_context(self._store.held(clip.file, suffix=clip.type.suffix))).as_uri()
        name = hmac.digest(self._secret, f"{record.tenant} {clip.file.digest}".encode(), "sha256")
        part.replace(url, uuid=name.hex())
        record.video_seconds += clip.facts.duration_seconds
        if record.longest_video is None or clip.facts.duration_seconds > record.longest_video.duration_seconds:
            record.longest_video = clip.facts
        self._metrics.video_bytes.observe(clip.file.size_bytes)
        self._metrics.video_duration.observe(clip.facts.duration_seconds)

    @asynccontextmanager
    async def _clip(self, part: MediaPart, record: RequestRecord) -> AsyncIterator[Clip]:
        scheme = part.value[:8].lower().partition(":")[0]
        if part.source == "upload":
            opened = self._uploaded(part, record)
        elif part.source == "base64" or scheme == "data":
            opened = self._given(part, record)
        elif scheme in ("http", "https"):
            opened = self._downloads.held(f"{part.kind} {part.value}", partial(self._fetched, part, record))
        else:
            raise MediaRefused(f"the {part.kind} URL must be an https or a data URL", code="invalid_media_url")
        async with opened as clip:
            yield clip

    @asynccontextmanager
    async def _given(self, part: MediaPart, record: RequestRecord) -> AsyncIterator[Clip]:
        """Give what came in the request."""
        begin = _begin_of_base64(part)
        data, begin = (part.value, begin) if part.payload is None else (part.payload, 0)
        if len(data) - begin > (self._max_bytes + 2) // 3 * 4:
            raise too_large(self._max_bytes)
        with in_memory(max_bytes=self._max_bytes) as file:
            with record.phase("parse"):
                await off_loop(_decode, data, begin, file, part.kind, size_bytes=len(data))
            yield await self._examined(file, part, record)

    @asynccontextmanager
    async def _uploaded(self, part: MediaPart, record: RequestRecord) -> AsyncIterator[Clip]:
        """Give what was uploaded before."""
        if self._uploads is None:
            raise InvalidRequest("this gateway keeps no files", param=part.param)
        try:
            path = await self._uploads.path_of(part.value, tenant=record.tenant)
        except GatewayError as exc:
            exc.param = part.param
            raise
        with on_disk(self._folder, max_bytes=self._max_bytes) as file:
            with record.phase("fetch"):
                try:
                    await asyncio.to_thread(_copy, path, file)
                except OSError as exc:
                    raise MediaRefused("the file could not be read: it may have been deleted just now") from exc
            yield await self._examined(file, part, record)

    @asynccontextmanager
    async def _fetched(self, part: MediaPart, record: RequestRecord) -> AsyncIterator[Clip]:
        """Give what is behind a URL."""
        with on_disk(self._folder, max_bytes=self._max_bytes) as file:
            with record.phase("fetch"):
                await self._fetcher.fetch(part.value, file)
            yield await self._examined(file, part, record)

    @property
    def _folder(self) -> Path | None:
        return None if self._store is None else self._store.directory

    async def _examined(self, file: MediaFile, part: MediaPart, record: RequestRecord) -> Clip:
        found = identify(file.head(HEAD_BYTES), part.kind)
        if found is None:
            article = "a" if part.kind == "video" else "an"
            raise MediaRefused(f"the data is not {article} {part.kind} of a kind this gateway takes")
        with record.phase("probe"):
            facts = await self._facts_about(file, part.kind, found)
        url = ""
        if part.kind != "video" or self._store is None:
            url = await self._data_url(file, part, found)
        return Clip(file, found, facts, url)

    async def _facts_about(self, file: MediaFile, kind: Kind, found: FileType) -> Facts:
        """Return the facts; what was seen before, as videos are that conversations are about, is not probed again."""
        key = (kind, file.digest)
        facts = self._facts.get(key)
        if facts is None:
            self._metrics.probes.inc()
            try:
                facts = await self._prober.probe(file.descriptor(), kind=kind, demuxer=found.demuxer)
            except ProbeError as exc:
                raise MediaRefused(str(exc), code=exc.code or _INVALID[kind]) from exc
            self._facts[key] = facts
            if len(self._facts) > REMEMBERED_FACTS:
                del self._facts[next(iter(self._facts))]
        return facts

    async def _data_url(self, file: MediaFile, part: MediaPart, found: FileType) -> str:
        """Return the content as a data URL, which for some parts stands in the request already."""
        if part.value[:5].lower() == "data:":
            return part.value
        prefix = f"data:{found.mime};base64,"
        if part.source == "base64":
            return prefix + part.value
        return await off_loop(file.encoded, partial(_encode, prefix), size_bytes=file.size_bytes)


def _begin_of_base64(part: MediaPart) -> int:
    if part.source == "base64":
        return 0
    head = _DATA_URL.match(part.value[:_HEAD_CHARACTERS])
    if head is None or head[1].lower() != part.kind:
        raise MediaRefused(
            f"the {part.kind}'s data URL must begin with data:{part.kind}/<type>;base64,", code="invalid_media_url"
        )
    if part.kind == "video" and head[2].lower() == "jpeg":  # engines read it as a list of frames, of any number
        raise MediaRefused("lists of frames (data:video/jpeg) are not taken", code="invalid_media_url")
    return head.end()


def _decode(data: str | memoryview, begin: int, file: MediaFile, kind: Kind) -> None:
    """Write what the base64 stands for into `file`, in pieces: there is never a second copy of all of it."""
    try:
        if len(data) - begin > _DECODED_CHARACTERS:
            file.write_all(partial(_decoded, data, begin))
        else:
            file.write(pybase64.b64decode(data[begin:], validate=True))
    except ValueError:  # also characters outside ASCII
        raise MediaRefused(f"the {kind}'s data is not valid base64", code="invalid_media_url") from None


def _decoded(data: str | memoryview, begin: int) -> Iterator[bytes]:
    for at in range(begin, len(data), _DECODED_CHARACTERS):
        content = pybase64.b64decode(data[at : at + _DECODED_CHARACTERS], validate=True)
        if len(content) < _DECODED_CHARACTERS // 4 * 3 and at + _DECODED_CHARACTERS < len(data):
            raise ValueError("padding before the end")
        yield content


def _encode(prefix: str, content: mmap.mmap) -> str:
    return prefix + pybase64.b64encode_as_string(content)


def _copy(path: Path, file: MediaFile) -> None:
    with path.open("rb") as source:
        while piece := source.read(COPY_BYTES):
            file.write(piece)
