"""A directory of videos that engines read: named by content, written atomically, bounded in bytes and age."""

import asyncio
import contextlib
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from server.errors import Overloaded

_OURS = re.compile(r"[0-9a-f]{64}\.[a-z0-9]{2,5}|\.incoming-.*")


class MediaStore:
    """Files under one directory, which no other gateway writes to. What a request holds is never evicted."""

    def __init__(self, directory: Path, *, max_bytes: int, max_age_seconds: float) -> None:
        """Take the directory as it is: files from an earlier run count."""
        self._directory = directory
        self._max_bytes = max_bytes
        self._max_age_seconds = max_age_seconds
        self._held: Counter[str] = Counter()
        self._writing = asyncio.Lock()

    @asynccontextmanager
    async def held(self, data: bytes, *, digest: str, suffix: str) -> AsyncIterator[Path]:
        """Give the file with `data`, there until the block ends; raise Overloaded if there is no room for it."""
        name = f"{digest}{suffix}"
        self._held[name] += 1
        try:
            async with self._writing:
                await asyncio.to_thread(self._write, name, data)
            del data  # the file lasts as long as the request; the copy in memory need not
            yield self._directory / name
        finally:
            self._held[name] -= 1
            if not self._held[name]:
                del self._held[name]

    async def sweep(self) -> None:
        """Delete what is too old."""
        async with self._writing:
            await asyncio.to_thread(self._make_room, 0)

    async def watch(self) -> None:
        """Sweep for ever."""
        while True:
            await asyncio.sleep(min(60.0, self._max_age_seconds / 4))
            await self.sweep()

    def _write(self, name: str, data: bytes) -> None:
        path = self._directory / name
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size == len(data):
                os.utime(path)
                return
        self._make_room(len(data))
        handle, incoming = tempfile.mkstemp(prefix=".incoming-", dir=self._directory)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                os.fchmod(file.fileno(), 0o644)  # the engine runs as another user
            Path(incoming).replace(path)
        except BaseException:
            Path(incoming).unlink(missing_ok=True)
            raise

    def _make_room(self, size_bytes: int) -> None:
        oldest_allowed = time.time() - self._max_age_seconds
        held = set(self._held)
        total, idle = 0, []
        for entry in os.scandir(self._directory):
            if not _OURS.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
                continue
            stat = entry.stat(follow_symlinks=False)
            total += stat.st_size
            if entry.name not in held:
                idle.append((stat.st_mtime, stat.st_size, entry.path))
        for modified, size, path in sorted(idle):
            if modified >= oldest_allowed and total + size_bytes <= self._max_bytes:
                break
            Path(path).unlink(missing_ok=True)
            total -= size
        if total + size_bytes > self._max_bytes:
            raise Overloaded("the store for videos is full, try again later")
