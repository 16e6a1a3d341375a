"""A medium on its way through the gateway: an unnamed file that knows its size and its SHA-256."""

import hashlib
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TypeVar

from server.errors import MediaRefused

COPY_BYTES = 2**20

T = TypeVar("T")


class MediaFile:
    """What was written so far, at most `max_bytes`. Writes from a thread that was given up do no harm: files lock."""

    def __init__(self, file: IO[bytes], *, max_bytes: int) -> None:
        """Take an empty file that its opener closes."""
        self._file = file
        self._max_bytes = max_bytes
        self._hash = hashlib.sha256()
        self.size_bytes = 0

    def write(self, piece: bytes) -> None:
        """Append; raise MediaRefused if that is too much."""
        self._count(piece)
        self._hash.update(piece)
        self._file.write(piece)

    def write_all(self, pieces: Callable[[], Iterator[bytes]]) -> None:
        """Append pieces that are cheap to make: a second thread makes them again, to hash them in the meantime."""
        with ThreadPoolExecutor(1) as second:
            hashed = second.submit(self._hash_all, pieces())
            for piece in pieces():
                self._count(piece)
                self._file.write(piece)
            hashed.result()

    def _hash_all(self, pieces: Iterator[bytes]) -> None:
        for piece in pieces:
            self._hash.update(piece)

    def _count(self, piece: bytes) -> None:
        self.size_bytes += len(piece)
        if self.size_bytes > self._max_bytes:
            raise too_large(self._max_bytes)

    @property
    def digest(self) -> str:
        """The SHA-256 of what was written, in hexadecimal."""
        return self._hash.hexdigest()

    def descriptor(self) -> int:
        """Return the file's descriptor, at the file's begin."""
        self._file.flush()
        self._file.seek(0)
        return self._file.fileno()

    def copy_to(self, file: IO[bytes]) -> None:
        """Write the content into another file."""
        self.descriptor()
        shutil.copyfileobj(self._file, file, COPY_BYTES)

    def encoded(self, encode: Callable[[mmap.mmap], T]) -> T:
        """Return what `encode` makes of the content; a file must have some."""
        with mmap.mmap(self.descriptor(), 0, access=mmap.ACCESS_READ) as content:
            return encode(content)


@contextmanager
def in_memory(*, max_bytes: int) -> Iterator[MediaFile]:
    """Give a file in memory, for what came with a request."""
    with ExitStack() as stack:
        if hasattr(os, "memfd_create"):
            file = stack.enter_context(os.fdopen(os.memfd_create("aot-media"), "w+b"))
        else:
            file = stack.enter_context(tempfile.TemporaryFile())
        yield MediaFile(file, max_bytes=max_bytes)


@contextmanager
def on_disk(directory: Path | None, *, max_bytes: int) -> Iterator[MediaFile]:
    """Give a file in `directory`, or where temporary files go, for what comes from elsewhere. It never has a name."""
    with tempfile.TemporaryFile(dir=directory) as file:
        yield MediaFile(file, max_bytes=max_bytes)


def too_large(max_bytes: int) -> MediaRefused:
    """Return the refusal of what has more than `max_bytes`."""
    return MediaRefused(f"the media is larger than {max_bytes} bytes", code="media_too_large")
