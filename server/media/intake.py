"""From the media URLs of a request to what its engine may read."""

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import pybase64

from server.errors import MediaRefused
from server.media.fetch import Fetcher
from server.media.identify import HEAD_BYTES, FileType, identify
from server.media.probe import ProbeError, Prober, in_memory
from server.media.store import MediaStore
from server.metrics import Metrics
from server.record import RequestRecord
from server.schemas import ChatRequest, Kind, MediaPart

OFF_LOOP_BYTES = 2**20  # larger pieces of work go to a thread
_DATA_URL = re.compile(r"data:video/[a-z0-9.+-]+;base64,", re.IGNORECASE)
_HEAD_CHARACTERS = 128
MAX_VIDEOS = 16  # in a request; each costs a probe

T = TypeVar("T")


@dataclass(frozen=True)
class Clip:
    """Media that was fetched, identified and, if it is a video, probed."""

    data: bytes = field(repr=False)
    type: FileType
    url: str = field(repr=False)
    """A data URL; empty for what goes through the store."""
    digest: str
    size_bytes: int


class Intake:
    """Takes in the media of requests. Without a store, engines are given data URLs."""

    def __init__(
        self,
        *,
        fetcher: Fetcher,
        prober: Prober,
        store: MediaStore | None,
        max_bytes: int,
        max_seconds: float,
        metrics: Metrics,
    ) -> None:
        """Bound each video by bytes and seconds, and what is fetched for one request by the same bytes."""
        self._fetcher = fetcher
        self._prober = prober
        self._store = store
        self._max_bytes = max_bytes
        self._max_seconds = max_seconds
        self._metrics = metrics
        self._downloads: Shared[Clip] = Shared()

    @asynccontextmanager
    async def taken(self, chat: ChatRequest, record: RequestRecord) -> AsyncIterator[None]:
        """Check each media part and put in its place what the engine may read; files last until the block ends.

        Raises MediaRefused, with the part's place as `param`.
        """
        fetched_bytes = num_videos = 0
        async with AsyncExitStack() as files:
            videos = hashlib.sha256()
            for part in chat.media:  # in turn: a request's videos are few, and one at a time bounds its memory
                try:
                    num_videos += part.kind == "video"
                    if num_videos > MAX_VIDEOS:
                        raise MediaRefused(f"at most {MAX_VIDEOS} videos are taken in a request")
                    fetched_bytes += await self._take(part, record, files)
                    if part.kind == "video":
                        await _off_loop(videos.update, part.url.encode(), size_bytes=len(part.url))
                        record.media_key = videos.hexdigest()
                    if fetched_bytes > self._max_bytes:
                        raise MediaRefused(
                            f"the media of the request are larger than {self._max_bytes} bytes", code="media_too_large"
                        )
                except MediaRefused as exc:
                    raise MediaRefused(exc.message, param=exc.param or f"{part.param}.url", code=exc.code) from exc
            yield

    async def _take(self, part: MediaPart, record: RequestRecord, files: AsyncExitStack) -> int:
        """Take in one part; return how many bytes were fetched for it."""
        scheme = part.url[:8].lower().partition(":")[0]
        if scheme == "data":
            if part.kind == "video":
                await self._check_inline(part, record)
            return 0
        if scheme in ("http", "https"):
            clip = await self._fetched(part, record)
            if self._store is not None and part.kind == "video":
                path = await files.enter_async_context(
                    self._store.held(clip.data, digest=clip.digest, suffix=clip.type.suffix)
                )
                part.replace(path.as_uri())
            else:
                part.replace(clip.url)
            return clip.size_bytes
        raise MediaRefused(f"the {part.kind} URL must be an https or a data URL", code="invalid_media_url")

    async def _check_inline(self, part: MediaPart, record: RequestRecord) -> None:
        head = _DATA_URL.match(part.url[:_HEAD_CHARACTERS])
        if head is None:
            raise MediaRefused("a video's data URL must begin with data:video/<type>;base64,", code="invalid_media_url")
        if len(part.url) - head.end() > (self._max_bytes + 2) // 3 * 4:
            raise MediaRefused(f"the media is larger than {self._max_bytes} bytes", code="media_too_large")
        with record.phase("parse"):
            data = await _off_loop(_decode, part.url, head.end(), size_bytes=len(part.url))
        part.is_plain = True
        with record.phase("probe"):
            await self._check_video(data, _identified(data, "video"))

    async def _fetched(self, part: MediaPart, record: RequestRecord) -> Clip:
        async def fetch() -> Clip:
            with record.phase("fetch"):
                data = await self._fetcher.fetch(part.url)
            found = _identified(data, part.kind)
            if part.kind == "video":
                with record.phase("probe"):
                    await self._check_video(data, found)
            as_file = self._store is not None and part.kind == "video"
            return await _off_loop(_pack, data, found, as_file, size_bytes=len(data))

        return await self._downloads.run(f"{part.kind} {part.url}", fetch)

    async def _check_video(self, data: bytes, found: FileType) -> None:
        try:
            with ExitStack() as stack:
                descriptor = await _off_loop(stack.enter_context, in_memory(data), size_bytes=len(data))
                facts = await self._prober.probe(descriptor, found.demuxer)
        except ProbeError as exc:
            raise MediaRefused(str(exc), code="invalid_video") from exc
        self._metrics.video_bytes.observe(len(data))
        self._metrics.video_duration.observe(facts.duration_seconds)
        if facts.duration_seconds > self._max_seconds:
            raise MediaRefused(
                f"the video lasts {facts.duration_seconds:.6g} seconds, at most {self._max_seconds:g} are allowed",
                code="video_too_long",
            )


class Shared(Generic[T]):
    """Calls with the same key at the same time become one call, which is cancelled once nobody waits for it."""

    def __init__(self) -> None:
        """Start with no call."""
        self._running: dict[str, tuple[asyncio.Task[T], list[None]]] = {}

    async def run(self, key: str, call: Callable[[], Awaitable[T]]) -> T:
        """Return the result of `call`, or of the one already running under `key`."""
        if key not in self._running:
            self._running[key] = (asyncio.ensure_future(_coroutine(call)), [])
        task, waiters = self._running[key]
        waiters.append(None)
        try:
            return await asyncio.shield(task)
        finally:
            waiters.pop()
            if task.done() or not waiters:
                task.cancel()
                if self._running.get(key, (None,))[0] is task:
                    del self._running[key]


async def _coroutine(call: Callable[[], Awaitable[T]]) -> T:
    return await call()


async def _off_loop(work: Callable[..., T], *arguments: object, size_bytes: int) -> T:
    if size_bytes > OFF_LOOP_BYTES:
        return await asyncio.to_thread(work, *arguments)
    return work(*arguments)


def _decode(url: str, begin: int) -> bytes:
    try:
        return pybase64.b64decode(url[begin:], validate=True)
    except ValueError:  # also characters outside ASCII
        raise MediaRefused("the video's data URL is not valid base64", code="invalid_media_url") from None


def _pack(data: bytes, found: FileType, as_file: bool) -> Clip:
    if as_file:
        return Clip(data, found, "", hashlib.sha256(data).hexdigest(), len(data))
    return Clip(b"", found, f"data:{found.mime};base64,{pybase64.b64encode_as_string(data)}", "", len(data))


def _identified(data: bytes, kind: Kind) -> FileType:
    found = identify(data[:HEAD_BYTES], kind)
    if found is None:
        article = "an" if kind in ("image", "audio") else "a"
        raise MediaRefused(f"the data is not {article} {kind} of a kind this gateway takes", code="invalid_media")
    return found
