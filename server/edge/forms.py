"""Reads form data with a file (multipart/form-data) while it arrives: keeps the fields and passes the file on."""

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.datastructures import Headers
from starlette.types import Receive

from server.edge.body import consume_body, declared_length
from server.errors import InvalidRequest

MAX_FIELDS = 16
MAX_FIELD_BYTES = 1024
MAX_PART_HEADERS = 8
MAX_HEADER_BYTES = 4096
OVERHEAD_BYTES = MAX_FIELDS * (MAX_FIELD_BYTES + MAX_PART_HEADERS * MAX_HEADER_BYTES)
_EXTENDED_FILENAME = re.compile(rb""";\s*filename\*\s*=\s*"?([A-Za-z0-9._-]{0,40})'[^';]*'([^;"\s]*)""", re.IGNORECASE)


@dataclass
class Form:
    """The fields of a form, and the name of its file."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None


async def read_form(
    headers: Headers,
    receive: Receive,
    write: Callable[[bytes], Awaitable[None]],
    *,
    file_field: str,
    max_file_bytes: int,
    seconds: float,
) -> Form:
    """Return the form, after passing its file to `write` in pieces.

    Raises InvalidRequest if the body is not form data, if it does not have exactly one file, in the field
    `file_field`, or if it exceeds a limit of this module. Also raises the errors of `declared_length`,
    of `consume_body` and of `write`.
    """
    reader = _Reader(_boundary(headers), file_field)

    async def consume(piece: bytes) -> None:
        for part in reader.feed(piece):
            await write(part)

    most, announced = max_file_bytes + OVERHEAD_BYTES, declared_length(headers)
    await consume_body(receive, consume, announced=announced, max_bytes=most, seconds=seconds)
    return reader.end()


def _boundary(headers: Headers) -> bytes:
    kind, options = parse_options_header(headers.get("content-type", ""))
    if kind.lower() != b"multipart/form-data" or not options.get(b"boundary"):
        raise InvalidRequest("the request body must be form data (multipart/form-data) with a boundary")
    return options[b"boundary"]


def _filename(disposition: bytes, options: Mapping[bytes, bytes]) -> str | None:
    """Return the name of a file, None for a field. `filename*` (RFC 5987) says it in any encoding, and goes first."""
    extended = _EXTENDED_FILENAME.search(disposition)
    if extended is not None:
        name = unquote_to_bytes(extended[2])
        try:
            return name.decode(extended[1].decode("ascii") or "utf-8", errors="replace")
        except LookupError:
            return name.decode("utf-8", errors="replace")
    return options[b"filename"].decode("utf-8", errors="replace") if b"filename" in options else None


class _Reader:
    """Collects the fields and the pieces of the file from the parser's callbacks."""

    def __init__(self, boundary: bytes, file_field: str) -> None:
        self._file_field = file_field
        self._form = Form()
        self._num_fields = 0
        self._header = self._header_value = b""
        self._disposition = b""
        self._name: str | None = None
        self._value = bytearray()
        self._pieces: list[bytes] = []
        self._ended = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._part_begins,
                    "on_header_field": self._header_goes_on,
                    "on_header_value": self._header_value_goes_on,
                    "on_header_end": self._header_ends,
                    "on_headers_finished": self._headers_end,
                    "on_part_data": self._data,
                    "on_part_end": self._part_ends,
                    "on_end": self._end,
                },
                max_header_count=MAX_PART_HEADERS,
                max_header_size=MAX_HEADER_BYTES,
            )
        except FormParserError as exc:
            raise InvalidRequest("the form data's boundary is too long") from exc

    def feed(self, piece: bytes) -> list[bytes]:
        """Parse `piece` of the body, and return the pieces of the file that it holds."""
        try:
            self._parser.write(piece)
        except FormParserError as exc:
            raise InvalidRequest("the form data can't be read") from exc
        pieces, self._pieces = self._pieces, []
        return pieces

    def end(self) -> Form:
        """Return the form; raise InvalidRequest if the body ended early or held no file."""
        if not self._ended:
            raise InvalidRequest("the form data ends early")
        if self._form.filename is None:
            raise InvalidRequest(f"the form data must hold a file called {self._file_field}", param=self._file_field)
        return self._form

    def _part_begins(self) -> None:
        self._num_fields += 1
        if self._num_fields > MAX_FIELDS:
            raise InvalidRequest(f"the form data has more than {MAX_FIELDS} fields")
        self._disposition, self._name = b"", None
        self._value.clear()

    def _header_goes_on(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value_goes_on(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _header_ends(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header = self._header_value = b""

    def _headers_end(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise InvalidRequest("a field of the form data has no name")
        name = options[b"name"].decode("utf-8", errors="replace")
        filename = _filename(self._disposition, options)
        if filename is None:
            self._name = name
            return
        if name != self._file_field or self._form.filename is not None:
            raise InvalidRequest(f"the form data must hold one file, called {self._file_field}", param=name[:80])
        self._form.filename = filename

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._name is None:
            self._pieces.append(data[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > MAX_FIELD_BYTES:
            raise InvalidRequest(
                f"a field of the form data is longer than {MAX_FIELD_BYTES} bytes", param=self._name[:80]
            )

    def _part_ends(self) -> None:
        if self._name is None:
            return
        if self._name in self._form.fields:
            raise InvalidRequest(f"the form data holds {self._name[:80]} twice", param=self._name[:80])
        self._form.fields[self._name] = self._value.decode("utf-8", errors="replace")

    def _end(self) -> None:
        self._ended = True
