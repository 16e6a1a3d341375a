"""The content of a medium while a request is served: an unnamed file with its size and SHA-256."""

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
    """A file of at most `max_bytes` that counts and hashes what is written to it.

    A thread whose request was cancelled may still be writing. This does no harm, because file objects have a lock.
    """

    def __init__(self, file: IO[bytes], *, max_bytes: int) -> None:
        """Take an empty file. Whoever opened it closes it."""
        self._file = file
        self._max_bytes = max_bytes
        self._hash = hashlib.sha256()
        self.size_bytes = 0

    def write(self, piece: bytes) -> None:
        """Append `piece`; raise MediaRefused if the file becomes larger than `max_bytes`."""
        self._count(piece)
        self._hash.update(piece)
        self._file.write(piece)

    def write_all(self, pieces: Callable[[], Iterator[bytes]]) -> None:
        """Append all `pieces()`, and hash them in a second thread at the same time.

        Each thread calls `pieces` for itself, so making the pieces must be cheap.
        """
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

    def clear(self) -> None:
        """Remove all content, so that other content can be written."""
        self._file.seek(0)
        self._file.truncate()
        self._hash = hashlib.sha256()
        self.size_bytes = 0

    @property
    def digest(self) -> str:
        """The SHA-256 of the content, in hexadecimal."""
        return self._hash.hexdigest()

    def descriptor(self) -> int:
        """Return the file's descriptor, with its offset at 0."""
        self._file.flush()
        self._file.seek(0)
        return self._file.fileno()

    def copy_to(self, file: IO[bytes]) -> None:
        """Write the content to another file."""
        self.descriptor()
        shutil.copyfileobj(self._file, file, COPY_BYTES)

    def encoded(self, encode: Callable[[mmap.mmap], T]) -> T:
        """Return `encode(content)`. The file must not be empty."""
        with mmap.mmap(self.descriptor(), 0, access=mmap.ACCESS_READ) as content:
            return encode(content)


@contextmanager
def in_memory(*, max_bytes: int) -> Iterator[MediaFile]:
    """Yield a file in memory, for media that came in the request."""
    with ExitStack() as stack:
        if hasattr(os, "memfd_create"):
            file = stack.enter_context(os.fdopen(os.memfd_create("aot-media"), "w+b"))
        else:
            file = stack.enter_context(tempfile.TemporaryFile())
        yield MediaFile(file, max_bytes=max_bytes)


@contextmanager
def on_disk(directory: Path | None, *, max_bytes: int) -> Iterator[MediaFile]:
    """Yield an unnamed file on disk, for media that did not come in the request.

    The file is in `directory`. If `directory` is None, it is in the system's directory for temporary files.
    """
    with tempfile.TemporaryFile(dir=directory) as file:
        yield MediaFile(file, max_bytes=max_bytes)


def too_large(max_bytes: int) -> MediaRefused:
    """Return the error for media larger than `max_bytes`."""
    return MediaRefused(f"the media is larger than {max_bytes} bytes", code="media_too_large")
