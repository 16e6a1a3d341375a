"""Frames of videos for engines: sampled once, kept in the store under a name that says how they were made."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pybase64

from server.errors import MediaRefused
from server.media.examine import refusal, type_of
from server.media.file import MediaFile, in_memory
from server.media.handover import Handover
from server.media.readers import Reader
from server.media.share import Shared
from server.media.store import MediaStore
from server.observe.metrics import Metrics
from server.reader.facts import ReadError
from server.reader.frames_file import PAGE_BYTES, FramesHeader, compressed, read_header

SUFFIX = ".frames"
_PREFIX = "data:video/x-aot-frames;base64,"
_HEADER_BYTES = 16 * PAGE_BYTES


@dataclass(frozen=True)
class Frames:
    """The frames of one video."""

    name: str
    """What they are known by: the same video, sampled in the same way, has the same name."""
    header: FramesHeader
    url: str = field(repr=False)
    """Where the engine finds them: a file in the store, or a data URL."""


@dataclass(frozen=True)
class _Order:
    """Frames that are to be made."""

    name: str
    descriptor: int
    """The video; it is closed once the frames are there."""
    way: Handover
    max_bytes: int


class Sampler:
    """Samples frames from videos. Requests that want the same frames at the same time share the work."""

    def __init__(self, reader: Reader, *, store: MediaStore | None, metrics: Metrics) -> None:
        """Keep frames in `store`. Without a store they are made for each request, and travel in it."""
        self._reader = reader
        self._store = store
        self._probes = metrics.probes
        self._shared: Shared[Frames] = Shared()

    @asynccontextmanager
    async def frames_of(self, video: MediaFile, way: Handover, *, max_bytes: int) -> AsyncIterator[Frames]:
        """Yield the frames of a video, there until the block ends; they take at most `max_bytes`.

        Raises MediaRefused if the video can't be read, and Overloaded if the store is full.
        """
        name = way.name_of(video.digest)

        def opened() -> AbstractAsyncContextManager[Frames]:
            # A descriptor of its own: the request that asked first may leave before the others.
            order = _Order(name, os.dup(video.descriptor()), way, max_bytes)
            return self._in_memory(order) if self._store is None else self._in_store(order, self._store)

        async with self._shared.held(name, opened) as frames:
            if frames.header.pixels_bytes > max_bytes:
                raise MediaRefused(
                    f"the video's frames take {frames.header.pixels_bytes} bytes, "
                    f"and the media of the request may take {max_bytes} more",
                    code="media_too_large",
                )
            yield frames

    @asynccontextmanager
    async def _in_store(self, order: _Order, store: MediaStore) -> AsyncIterator[Frames]:
        async def make(into: int) -> None:
            await self._read(order, into)

        try:
            name = f"{order.name}{SUFFIX}"
            room = min(order.max_bytes, order.way.likely_bytes) + _HEADER_BYTES
            async with store.held_as(name, make, most_bytes=room) as file:
                header, _ = read_header(file.fileno())
                yield Frames(order.name, header, Path(store.directory, name).as_uri())
        finally:
            os.close(order.descriptor)

    @asynccontextmanager
    async def _in_memory(self, order: _Order) -> AsyncIterator[Frames]:
        try:
            with in_memory(max_bytes=order.max_bytes + _HEADER_BYTES) as file:
                header = await self._read(order, file.descriptor())
                url = await asyncio.to_thread(_data_url, file.descriptor())
        finally:
            os.close(order.descriptor)
        yield Frames(order.name, header, url)

    async def _read(self, order: _Order, into: int) -> FramesHeader:
        self._probes.inc()
        wanted = order.way.wanted(max_bytes=order.max_bytes)
        demuxer = type_of(order.descriptor, "video").demuxer
        try:
            reading = await self._reader.read(order.descriptor, demuxer=demuxer, wanted=wanted, into=into)
        except ReadError as exc:
            raise refusal(exc, "video") from exc
        return reading.header


def _data_url(descriptor: int) -> str:
    return _PREFIX + pybase64.b64encode_as_string(b"".join(compressed(descriptor)))
