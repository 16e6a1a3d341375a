"""The media store: a directory of videos, and of frames sampled from them, that engines read.

A video is named by the SHA-256 of its content, frames by that of how they were made. Files are written atomically, and
bounded in total size and in age.
"""

import asyncio
import fcntl
import logging
import os
import re
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import IO

from server.errors import Overloaded
from server.media.file import MediaFile
from server.media.threads import opened_off_loop

logger = logging.getLogger(__name__)

_OURS = re.compile(r"[0-9a-f]{64}\.[a-z0-9]{2,6}|\.incoming-.*")


class MediaStore:
    """The files in one directory, which several gateways on a host may share.

    A file that a request holds has a shared lock (`flock`). No gateway on the host evicts a file with a lock.
    """

    def __init__(self, directory: Path, *, max_bytes: int, max_age_seconds: float) -> None:
        """Use the directory with its present content: files of earlier runs and of other gateways count too."""
        self.directory = directory
        self._max_bytes = max_bytes
        self._max_age_seconds = max_age_seconds
        self._writing = asyncio.Lock()
        self._reserved_bytes = 0

    @asynccontextmanager
    async def held(self, media: MediaFile, *, suffix: str) -> AsyncIterator[Path]:
        """Yield the path of a file with the content of `media`. The file stays in the store until the block ends.

        `media` itself may be closed earlier. Raises Overloaded if the store is full.
        """
        path = self.directory / f"{media.digest}{suffix}"
        async with self._writing:
            file = await opened_off_loop(self._placed, path, media)
        with file:
            yield path

    @asynccontextmanager
    async def held_as(
        self, name: str, make: Callable[[int], Awaitable[None]], *, most_bytes: int
    ) -> AsyncIterator[IO[bytes]]:
        """Yield the file called `name`, open. The file stays in the store until the block ends.

        If it is missing, `make` writes it into the descriptor that it gets, at most `most_bytes`. Raises Overloaded if
        the store is full, and what `make` raises.
        """
        path = self.directory / name
        file = await asyncio.to_thread(_locked, path)
        if file is None:
            file = await self._made(path, make, most_bytes)
        with file:
            yield file

    async def _made(self, path: Path, make: Callable[[int], Awaitable[None]], most_bytes: int) -> IO[bytes]:
        async with self._writing:
            await asyncio.to_thread(self._make_room, most_bytes)
            self._reserved_bytes += most_bytes
        with ExitStack() as undo:
            try:
                handle, incoming = tempfile.mkstemp(prefix=".incoming-", dir=self.directory)
                undo.callback(Path(incoming).unlink, missing_ok=True)
                file = undo.enter_context(os.fdopen(handle, "r+b"))
                fcntl.flock(file, fcntl.LOCK_SH)
                await make(file.fileno())
            finally:
                self._reserved_bytes -= most_bytes
            _publish(file, incoming, path)
            undo.pop_all()
        return file

    async def sweep(self) -> None:
        """Delete files that are too old, unless a request holds them."""
        async with self._writing:
            await asyncio.to_thread(self._evict, 0)

    async def watch(self) -> None:
        """Sweep periodically, forever. A sweep that fails is logged, and the next one tries again."""
        while True:
            await asyncio.sleep(min(60.0, self._max_age_seconds / 4))
            try:
                await self.sweep()
            except OSError:
                logger.exception("the media store could not be swept")

    def _placed(self, path: Path, media: MediaFile) -> IO[bytes]:
        """Return the file at `path`, open and locked. Write it first if it is missing or incomplete."""
        file = _locked(path, media.size_bytes)
        if file is None:
            self._make_room(media.size_bytes)
            file = self._write(path, media)
        return file

    def _write(self, path: Path, media: MediaFile) -> IO[bytes]:
        with ExitStack() as undo:
            handle, incoming = tempfile.mkstemp(prefix=".incoming-", dir=self.directory)
            undo.callback(Path(incoming).unlink, missing_ok=True)
            file = undo.enter_context(os.fdopen(handle, "wb"))
            fcntl.flock(file, fcntl.LOCK_SH)
            media.copy_to(file)
            file.flush()
            _publish(file, incoming, path)
            undo.pop_all()
        return file

    def _make_room(self, size_bytes: int) -> None:
        """Evict files until there is room for `size_bytes`; raise Overloaded if requests hold too much."""
        size_bytes += self._reserved_bytes
        if self._evict(size_bytes) + size_bytes > self._max_bytes:
            raise Overloaded("the store for videos is full, try again later")

    def _evict(self, size_bytes: int) -> int:
        """Evict what is too old, and what is in the way of `size_bytes`; return the bytes that are left."""
        oldest_allowed = time.time() - self._max_age_seconds
        total, files = 0, []
        for entry in os.scandir(self.directory):
            if not _OURS.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
                continue
            with suppress(FileNotFoundError):
                stat = entry.stat(follow_symlinks=False)
                total += stat.st_size
                files.append((stat.st_mtime, stat.st_size, entry.path))
        for modified, size, path in sorted(files):
            if modified >= oldest_allowed and total + size_bytes <= self._max_bytes:
                break
            if _evicted(path):
                total -= size
        return total


def _publish(file: IO[bytes], incoming: str, path: Path) -> None:
    """Give a file that has been written its name."""
    os.fchmod(file.fileno(), 0o644)  # the engine runs as another user
    os.replace(incoming, path)


def _locked(path: Path, size_bytes: int | None = None) -> IO[bytes] | None:
    """Return the file at `path`, open, locked and marked as just used; None if it is missing or has another size."""
    with ExitStack() as undo:
        try:
            file = undo.enter_context(path.open("rb"))
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        stat = os.fstat(file.fileno())
        if not stat.st_nlink:  # evicted before it was locked
            return None
        if size_bytes is not None and stat.st_size != size_bytes:  # truncated by a crash
            return None
        with suppress(PermissionError):  # the file belongs to another gateway, which runs as another user
            os.utime(file.fileno())
        undo.pop_all()
    return file


def _evicted(path: str) -> bool:
    """Delete the file unless a request holds it; return whether the file is gone."""
    with suppress(FileNotFoundError), open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        Path(path).unlink(missing_ok=True)
    return True
