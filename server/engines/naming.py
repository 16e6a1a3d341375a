"""The model's name in engines' answers: clients get the name that they asked for, an alias, instead of the engine's."""

import json
import re
from functools import lru_cache
from typing import Final

_MODEL = re.compile(rb'"model":\s*("(?:[^"\\]|\\.)*")')  # always a key: inside a JSON string, its quotes are escaped
_HEAD_BYTES: Final = 2048


class Renaming:
    """Puts a model's name in place of the engine's own in the events of a stream. No event but the first is searched.

    The engine's own name is taken from its first event, because it need not be the one that it was asked by.
    """

    def __init__(self, model: str | None) -> None:
        """Put `model` in place of the engine's name. With None, events stay as they are."""
        self._model = model
        self._names: tuple[bytes, bytes] | None = None

    def __call__(self, events: bytes) -> bytes:
        """Return the events with the name."""
        if self._names is None:
            found = None if self._model is None else _MODEL.search(events)
            if found is None or self._model is None:
                return events
            begin = found.start(1) - found.start()
            self._names = found[0], found[0][:begin] + _quoted(self._model)
        old, new = self._names
        return events if old == new else events.replace(old, new)


def renamed(body: bytes, model: str) -> bytes:
    """Return an engine's whole answer with `model` as its model, and nothing else changed.

    An answer that is no JSON object, or that names no model, is returned as it is.
    """
    found = _MODEL.search(body, 0, _HEAD_BYTES)
    if found is not None and body.count(b"{", 0, found.start()) == 1 and body.find(b"[", 0, found.start()) < 0:
        name = _quoted(model)
        return body if found[1] == name else b"".join((body[: found.start(1)], name, body[found.end(1) :]))
    try:
        content = json.loads(body)
    except ValueError:
        return body
    if not isinstance(content, dict) or content.get("model") in (None, model):
        return body
    content["model"] = model
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


@lru_cache
def _quoted(model: str) -> bytes:
    return json.dumps(model, ensure_ascii=False).encode(errors="replace")
