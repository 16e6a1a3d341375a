"""Takes in the media of a request: fetches or decodes, examines, and replaces each by a URL for the engine."""

import asyncio
import hashlib
import hmac
import mmap
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import pybase64

from server.admission.buffers import Buffer
from server.aliases import Target
from server.engines.pool import EnginePool
from server.engines.profile import EngineProfile, Reduction, VideoRules
from server.errors import GatewayError, InvalidRequest, MediaRefused
from server.media.data_url import DataHead, decode, read_head, what_to_send
from server.media.examine import WITH_ARTICLE, Examiner, type_of
from server.media.fetch import Fetcher
from server.media.file import COPY_BYTES, MediaFile, in_memory, on_disk
from server.media.frames import Sampler
from server.media.handover import Handover, handover
from server.media.identify import FileType
from server.media.part import MediaPart
from server.media.shape import VideoShape
from server.media.share import Shared
from server.media.store import MediaStore
from server.media.threads import off_loop
from server.observe.metrics import Metrics
from server.observe.record import RequestRecord
from server.reader.facts import Facts
from server.reader.frames_file import FramesHeader

MAX_MEDIA = 64  # per request; each costs a probe
MAX_VIDEOS = 16
LIST_OF_FRAMES = "video/jpeg"  # engines read this as an unbounded list of frames


class Uploads(Protocol):
    """The files that clients have uploaded."""

    async def path_of(self, file_id: str, *, tenant: str) -> Path:
        """Return the path of the tenant's file; raise a GatewayError if the tenant has no file with this id."""


@dataclass(frozen=True)
class Clip:
    """A medium that has been examined."""

    file: MediaFile
    type: FileType
    facts: Facts
    url: str = field(repr=False)
    """What the engine gets: the content as a data URL, or as base64 alone where the part takes no URL.

    Empty if the engine gets the medium through the store.
    """


@dataclass(frozen=True)
class Taken:
    """A summary of the media that were taken in with a request."""

    key: str | None = None
    """The affinity key, a hash of the videos' content. Requests with the same key go to the same engine."""
    video_seconds: float = 0.0
    longest_video: Facts | None = None
    rules: VideoRules | None = None
    """The rules by which frames were sampled from the videos. None if the engine gets the videos themselves."""
    shapes: tuple[VideoShape, ...] = ()
    """The frames of each video."""
    videos: tuple[Facts, ...] = ()
    """What each video holds."""
    reduction: Reduction | None = None
    """How the engines reduce videos unless a request says otherwise. None without `rules`."""


NOTHING = Taken()
NO_FACTS = Facts(container="", codec="")


@dataclass(frozen=True)
class _Asked:
    """The request whose media are taken in: its tenant, and where its time and its memory are counted."""

    tenant: str
    record: RequestRecord
    buffer: Buffer
    way: Handover | None


@dataclass
class _Tally:
    """The running totals over the media of one request."""

    num_videos: int = 0
    size_bytes: int = 0
    decoded_bytes: int = 0
    digests: list[str] = field(default_factory=list)
    videos: list[Facts] = field(default_factory=list)
    shapes: list[VideoShape] = field(default_factory=list)

    def taken(self, way: Handover | None, profile: EngineProfile | None) -> Taken:
        return Taken(
            rules=None if way is None else way.rules,
            reduction=None if profile is None else profile.reduction,
            shapes=tuple(self.shapes),
            videos=tuple(self.videos),
            key=self._key(),
            video_seconds=sum(facts.duration_seconds for facts in self.videos),
            longest_video=max(self.videos, key=lambda facts: facts.duration_seconds, default=None),
        )

    def _key(self) -> str | None:
        if len(self.digests) < 2:
            return self.digests[0] if self.digests else None
        return hashlib.sha256("".join(self.digests).encode()).hexdigest()


class Intake:
    """Takes in the media of requests. Without a store, engines get videos as data URLs."""

    def __init__(
        self,
        *,
        fetcher: Fetcher,
        examiner: Examiner,
        sampler: Sampler,
        pool: EnginePool,
        full_size: bool,
        store: MediaStore | None,
        uploads: Uploads | None,
        max_bytes: int,
        max_decoded_bytes: int,
        secret: bytes,
        metrics: Metrics,
    ) -> None:
        """Limit the media of a request, together, to `max_bytes`, and to `max_decoded_bytes` in an engine's memory.

        Engines of `pool` that tell how they sample are handed frames, other engines the videos themselves. With
        `full_size` frames keep their size. `secret` is the HMAC key for the names under which engines cache videos.
        Without it nobody can guess or forge the name of another tenant's video.
        """
        self._fetcher = fetcher
        self._examiner = examiner
        self._sampler = sampler
        self._pool = pool
        self._full_size = full_size
        self._store = store
        self._uploads = uploads
        self._max_bytes = max_bytes
        self._max_decoded_bytes = max_decoded_bytes
        self._secret = secret
        self._metrics = metrics
        self._downloads: Shared[Clip] = Shared()

    @asynccontextmanager
    async def taken(
        self, media: Sequence[MediaPart], *, target: Target, tenant: str, record: RequestRecord, buffer: Buffer
    ) -> AsyncIterator[Taken]:
        """Check each medium, and replace it in the request by a URL that the engine may read. Yields a summary.

        Files in the store stay there until the block ends. Data URLs that are added to the request count in `buffer`,
        and times in `record`.
        Raises MediaRefused, with the medium's place as `param`, SamplingRefused for frames that the target's engines
        can't be given, and Overloaded if the buffer or the store is full.
        """
        way = None
        if any(part.kind == "video" for part in media):
            rules = self._pool.video_rules(target.engine_model)
            way = handover(rules, target.sampling, full_size=self._full_size)
        asked, tally = _Asked(tenant, record, buffer, way), _Tally()
        async with AsyncExitStack() as files:
            for place, part in enumerate(media):  # one after another, which bounds the memory
                try:
                    if place >= MAX_MEDIA:
                        raise MediaRefused(f"a request must hold at most {MAX_MEDIA} media")
                    await self._take(part, asked, files, tally)
                except MediaRefused as exc:
                    raise exc.at(part.param) from exc
            yield tally.taken(way, None if way is None else self._pool.profile(target.engine_model, way.rules))

    async def _take(self, part: MediaPart, asked: _Asked, files: AsyncExitStack, tally: _Tally) -> None:
        if part.kind == "video":
            tally.num_videos += 1
            if tally.num_videos > MAX_VIDEOS:
                raise MediaRefused(f"a request must hold at most {MAX_VIDEOS} videos")
        async with self._clip(part, asked) as clip:
            tally.size_bytes += clip.file.size_bytes
            if tally.size_bytes > self._max_bytes:
                raise MediaRefused(
                    f"the media of the request are larger than {self._max_bytes} bytes", code="media_too_large"
                )
            if part.kind == "video":
                await self._take_video(part, clip, asked, files, tally)
                return
            tally.decoded_bytes += clip.facts.decoded_bytes
            self._check_decoded(tally)
            if clip.url != part.value:
                asked.buffer.grow(len(clip.url))
            part.replace(clip.url)

    async def _take_video(
        self, part: MediaPart, clip: Clip, asked: _Asked, files: AsyncExitStack, tally: _Tally
    ) -> None:
        if asked.way is None:
            tally.decoded_bytes += clip.facts.decoded_bytes
            self._check_decoded(tally)
            name, url, facts = clip.file.digest, clip.url, clip.facts
            if self._store is not None:
                url = (await files.enter_async_context(self._store.held(clip.file, suffix=clip.type.suffix))).as_uri()
        else:
            room = self._max_decoded_bytes - tally.decoded_bytes
            with asked.record.phase("probe"):
                frames = await files.enter_async_context(self._sampler.frames_of(clip.file, asked.way, max_bytes=room))
            tally.decoded_bytes += frames.header.pixels_bytes
            tally.shapes.append(VideoShape.of(frames.header))
            name, url, facts = frames.name, frames.url, _facts_in(frames.header)
        if url != part.value:
            asked.buffer.grow(len(url))
        part.replace(url, uuid=hmac.digest(self._secret, f"{asked.tenant} {name}".encode(), "sha256").hex())
        tally.digests.append(clip.file.digest)
        tally.videos.append(facts)
        self._metrics.video_bytes.observe(clip.file.size_bytes)
        self._metrics.video_duration.observe(facts.duration_seconds)

    def _check_decoded(self, tally: _Tally) -> None:
        if tally.decoded_bytes > self._max_decoded_bytes:
            raise MediaRefused(
                f"the media of the request take {tally.decoded_bytes} bytes when decoded, "
                f"at most {self._max_decoded_bytes} are allowed",
                code="media_too_large",
            )

    @asynccontextmanager
    async def _clip(self, part: MediaPart, asked: _Asked) -> AsyncIterator[Clip]:
        scheme = part.value.lstrip(" ")[:8].lower().partition(":")[0]
        if part.source == "upload":
            opened = self._uploaded(part, asked)
        elif part.source == "base64" or scheme == "data":
            opened = self._given(part, asked)
        elif scheme in ("http", "https"):
            opened = self._downloads.held(
                f"{part.kind} {asked.way is None} {part.value}", partial(self._fetched, part, asked)
            )
        else:
            raise MediaRefused(what_to_send(part.value, part.kind), code="invalid_media_url")
        async with opened as clip:
            yield clip

    @asynccontextmanager
    async def _given(self, part: MediaPart, asked: _Asked) -> AsyncIterator[Clip]:
        """Yield a medium that came in the request."""
        head = _head_of(part)
        data, begin = (part.value, head.begin) if part.payload is None else (part.payload, 0)
        with in_memory(max_bytes=self._max_bytes) as file:
            with asked.record.phase("parse"):
                is_strict = await off_loop(decode, data, begin, file, part.kind, size_bytes=len(data))
            yield await self._examined(file, part, asked, head=head, is_strict=is_strict)

    @asynccontextmanager
    async def _uploaded(self, part: MediaPart, asked: _Asked) -> AsyncIterator[Clip]:
        """Yield a medium that the tenant has uploaded."""
        if self._uploads is None:
            raise InvalidRequest("this gateway keeps no files", param=part.param)
        try:
            path = await self._uploads.path_of(part.value, tenant=asked.tenant)
        except GatewayError as exc:
            exc.param = part.param
            raise
        with on_disk(self._folder, max_bytes=self._max_bytes) as file:
            with asked.record.phase("fetch"):
                try:
                    await asyncio.to_thread(_copy, path, file)
                except OSError as exc:
                    raise MediaRefused("the file could not be read: it may have been deleted just now") from exc
            yield await self._examined(file, part, asked)

    @asynccontextmanager
    async def _fetched(self, part: MediaPart, asked: _Asked) -> AsyncIterator[Clip]:
        """Yield a medium that is downloaded from its URL."""
        with on_disk(self._folder, max_bytes=self._max_bytes) as file:
            with asked.record.phase("fetch"):
                await self._fetcher.fetch(part.value, file)
            yield await self._examined(file, part, asked, subject="file at the URL")

    @property
    def _folder(self) -> Path | None:
        return None if self._store is None else self._store.directory

    async def _examined(
        self,
        file: MediaFile,
        part: MediaPart,
        asked: _Asked,
        *,
        head: DataHead | None = None,
        is_strict: bool = False,
        subject: str = "data",
    ) -> Clip:
        """Return the medium in `file`, which errors call `subject`.

        It came behind `head` if there is one, as base64 that every decoder reads alike if it `is_strict`.
        """
        label = "" if head is None else head.label
        found = type_of(file.descriptor(), part.kind, subject=subject, label=label)
        if head is not None:
            _check_label(head, part, found)
        if part.kind == "video" and asked.way is not None:  # the reader looks into it while it samples frames
            return Clip(file, found, NO_FACTS, "")
        with asked.record.phase("probe"):
            examined = await self._examiner.examine(file.descriptor(), kind=part.kind, digest=file.digest)
        url = ""
        if part.kind != "video" or self._store is None:
            url = await self._for_engine(file, part, found, head.begin if head is not None and is_strict else None)
        return Clip(file, found, examined.facts, url)

    async def _for_engine(self, file: MediaFile, part: MediaPart, found: FileType, begin: int | None) -> str:
        """Return the content as base64 behind a head of the gateway's own.

        If `begin` is a number, the base64 is in the part's value, from there on.
        """
        head = "" if part.takes_base64_alone else f"data:{found.mime};base64,"
        if begin is not None:
            return part.value if begin == len(head) and part.value.startswith(head) else head + part.value[begin:]
        return await off_loop(file.encoded, partial(_encode, head), size_bytes=file.size_bytes)


def _facts_in(header: FramesHeader) -> Facts:
    """Return what a frames file says about its video."""
    return Facts(
        container="",
        codec="",
        width=header.source_width,
        height=header.source_height,
        duration_seconds=header.duration,
        frames=header.total_num_frames,
        fps=header.fps,
    )


def _head_of(part: MediaPart) -> DataHead:
    if part.source == "base64":
        return DataHead("", 0)
    head = read_head(part.value, part.kind)
    if head.label == LIST_OF_FRAMES:
        raise MediaRefused(f"lists of frames (data:{LIST_OF_FRAMES}) are not accepted", code="invalid_media_url")
    return head


def _check_label(head: DataHead, part: MediaPart, found: FileType) -> None:
    """Raise MediaRefused if a data URL's label contradicts the content, whose type is `found`."""
    if head.contradicts(part.kind) and head.contradicts(found.mime.partition("/")[0]):
        raise MediaRefused(
            f"the data URL says {head.label}, but its data is {WITH_ARTICLE[part.kind]} ({found.mime}): "
            f"begin it with data:{found.mime};base64,",
            code="invalid_media_url",
        )


def _encode(prefix: str, content: mmap.mmap) -> str:
    return prefix + pybase64.b64encode_as_string(content)


def _copy(path: Path, file: MediaFile) -> None:
    with path.open("rb") as source:
        while piece := source.read(COPY_BYTES):
            file.write(piece)
