"""Forwards an engine's server-sent events as bytes, and parses only the events that it must read or change."""

import json
import re
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

from server.engines.naming import Renaming
from server.engines.savings import Savings
from server.errors import EngineFailed, ErrorAnswer, GatewayError, engine_error

LONGEST_EVENT_BYTES = 16 * 2**20
_EVENT = re.compile(rb".*?(?:\r\n\r\n|\n\n)", re.DOTALL)
_EMPTY_CHOICES = re.compile(rb'"choices":\s*\[\s*\]')
_ABORTED = re.compile(rb'"finish_reason":\s*"abort"')  # in a JSON string, the quotes would be escaped
_TOKEN_FIELDS = ("content", "reasoning", "reasoning_content", "tool_calls", "refusal", "text")  # completions: text


class EventStream(ABC):
    """Takes an engine's stream in pieces of any size, and returns whole events for the client, as bytes.

    After each `feed`, `tokens` is the number of chunks with output so far, `failure` is the error that the engine
    reported in the stream, and `done` says whether the closing event has arrived. `usage` is the engine's `usage`.
    """

    LANDMARKS: tuple[bytes, ...]
    """Byte strings that mark events which must be parsed. A piece without any of them is forwarded unparsed."""

    def __init__(self, *, model: str | None = None) -> None:
        """Start with an empty buffer. Events get `model` as the model's name; with None they keep the engine's."""
        self._tail = bytearray()
        self._renamed = Renaming(model)
        self.tokens = 0
        self.done = False
        self.usage: dict[str, Any] = {}
        self.failure: GatewayError | None = None
        self.broke_off = False
        """Whether the failure is that the stream ended too early, and not an error that the engine answered with."""

    def feed(self, piece: bytes) -> bytes:
        """Take the next piece, and return the bytes that may be sent to the client now."""
        whole = self._renamed(self._whole_events(piece))
        if len(self._tail) > LONGEST_EVENT_BYTES:
            self._break_off("the engine's stream could not be read")
            return whole
        if not whole:
            return b""
        if self.tokens and not self._has_landmark(whole):
            self.tokens += whole.count(b"\ndata:") + whole.startswith(b"data:")
            return whole
        passed = []
        for event in _EVENT.findall(whole):
            passed.append(self._pass(event))
            if self.failure:
                break
        return b"".join(passed)

    def _has_landmark(self, events: bytes) -> bool:
        for mark in self.LANDMARKS:  # noqa: SIM110 - any() takes twice as long, and this is asked about every chunk
            if mark in events:
                return True
        return False

    def _whole_events(self, piece: bytes) -> bytes:
        """Return the events that are whole with `piece`. Nothing is searched twice for their ends."""
        if not self._tail:
            if piece.endswith(b"\n\n"):
                return piece
            cut = _end_of_events(piece, 0)
            self._tail += piece[cut:]
            return piece[:cut]
        searched = max(0, len(self._tail) - 3)
        self._tail += piece
        cut = _end_of_events(self._tail, searched)
        whole = bytes(self._tail[:cut])
        del self._tail[:cut]
        return whole

    def _break_off(self, message: str) -> None:
        self.failure, self.broke_off = EngineFailed(message), True

    def end(self) -> None:
        """Note that the engine has closed the stream. Without its closing event, this is a failure."""
        if not self.done and self.failure is None:
            self._break_off("the engine's stream ended early")

    def farewell(self, told: ErrorAnswer) -> bytes:
        """Return the error `told` as the last event of the stream."""
        return told.event()

    @abstractmethod
    def _pass(self, event: bytes) -> bytes:
        """Parse an event, note what it says, and return the bytes for the client. They may be empty."""


class ChatStream(EventStream):
    """A stream of chat or completion chunks, forwarded unchanged except for the model's name and the usage chunk."""

    LANDMARKS = (b'"usage"', b'"error"', b'"abort"', b"[DONE]")

    def __init__(self, *, savings: Savings | None, usage_wanted: bool, model: str | None = None) -> None:
        """Add `savings` to the usage chunk, or drop that chunk if the client did not ask for it (`usage_wanted`)."""
        super().__init__(model=model)
        self._savings = savings
        self._usage_wanted = usage_wanted

    def _pass(self, event: bytes) -> bytes:
        payload = _payload(event)
        if payload == b"[DONE]":
            self.done = True
            return event
        if is_aborted(payload):
            self._break_off("the engine broke off while working on this request")
            return b""
        has_usage = b'"usage"' in payload and _EMPTY_CHOICES.search(payload) is not None
        if self.tokens and not has_usage and b'"error"' not in payload:
            self.tokens += bool(payload)
            return event
        chunk = _object(payload)
        if "error" in chunk and "choices" not in chunk:
            self.failure = _stream_error(chunk)
            return b""
        if has_usage and chunk.get("choices") == [] and isinstance(chunk.get("usage"), dict):
            self.usage = chunk["usage"]
            return self._usage(event, chunk)
        if self.tokens or _carries_output(chunk):
            self.tokens += 1
        return event

    def _usage(self, event: bytes, chunk: dict[str, Any]) -> bytes:
        if not self._usage_wanted:
            return b""
        if self._savings is None:
            return event
        chunk["usage"]["video_tokens"] = self._savings.as_usage(chunk["usage"])
        return b"data: " + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class ResponseStream(EventStream):
    """A stream of `/v1/responses` events, forwarded unchanged except for the model's name and the usage."""

    LANDMARKS = (b'"response.completed"', b'"response.incomplete"', b'"response.failed"', b'"error"')

    def __init__(self, *, savings: Savings | None = None, model: str | None = None) -> None:
        """Put `model` and `savings` into the events that hold the response."""
        super().__init__()  # clients' own metadata may hold a key called model: events are renamed one by one
        self._savings = savings
        self._model = model

    def farewell(self, told: ErrorAnswer) -> bytes:
        """Return the error `told` as the last event of the stream, an event of type `error`."""
        error = told.content["error"]
        flat = {"type": "error", "code": error["code"], "message": error["message"], "param": error["param"]}
        return b"event: error\n" + replace(told, content={**flat, **told.content}).event()

    def _pass(self, event: bytes) -> bytes:
        fields = _object(_payload(event))
        kind = fields.get("type", "error" if "error" in fields else None)
        if kind in ("error", "response.failed"):
            self.failure = EngineFailed("the engine failed on this request")
            return b""
        response = fields.get("response")
        if kind in ("response.completed", "response.incomplete"):
            self.done = True
            usage = response.get("usage") if isinstance(response, dict) else None
            self.usage = usage if isinstance(usage, dict) else {}
        self.tokens += isinstance(kind, str) and kind.endswith(".delta")
        return self._as_asked(event, fields, response) if isinstance(response, dict) else event

    def _as_asked(self, event: bytes, fields: dict[str, Any], response: dict[str, Any]) -> bytes:
        """Return an event that holds the response with the model's name that was asked for, and with the savings."""
        is_changed = False
        if self._model is not None and response.get("model", self._model) != self._model:
            response["model"], is_changed = self._model, True
        if self._savings is not None and self.done:
            response["usage"] = {**self.usage, "video_tokens": self._savings.as_usage(self.usage)}
            is_changed = True
        if not is_changed:
            return event
        data = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
        return b"".join((event[: event.index(b"data:")], b"data: ", data, b"\n\n"))


def is_aborted(content: bytes) -> bool:
    """Return whether an engine says that it has given up a request before its end, as vLLM does when it is stopped."""
    return b'"abort"' in content and _ABORTED.search(content) is not None


def _end_of_events(data: bytes | bytearray, begin: int) -> int:
    """Return where the last whole event in `data` ends, 0 if none ends after `begin`."""
    lf, crlf = data.rfind(b"\n\n", begin), data.rfind(b"\r\n\r\n", begin)
    return max(lf + 2 if lf >= 0 else 0, crlf + 4 if crlf >= 0 else 0)


def _payload(event: bytes) -> bytes:
    return b"\n".join(line[5:].strip() for line in event.splitlines() if line.startswith(b"data:"))


def _object(payload: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(payload)
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _carries_output(chunk: dict[str, Any]) -> bool:
    choices = chunk.get("choices")
    if not isinstance(choices, list):
        return False
    deltas = [choice.get("delta", choice) for choice in choices if isinstance(choice, dict)]
    return any(isinstance(delta, dict) and any(delta.get(name) for name in _TOKEN_FIELDS) for delta in deltas)


def _stream_error(chunk: dict[str, Any]) -> GatewayError:
    error = chunk["error"]
    status = error.get("code") if isinstance(error, dict) else None
    return engine_error(status if isinstance(status, int) else 500, json.dumps(chunk).encode())
