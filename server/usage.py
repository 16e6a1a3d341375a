"""How many tokens an engine says a request used."""

import json
from typing import Any

_MARK = b'"usage":'  # inside a string of JSON its quotes would be escaped


def usage_in(body: bytes) -> dict[str, Any]:
    """Return the `usage` in an engine's answer, empty if there is none; the rest, maybe megabytes, is not parsed."""
    _, mark, rest = body.rpartition(_MARK)
    if not mark:
        return {}
    try:
        usage, _ = json.JSONDecoder().raw_decode(rest.decode("utf-8", errors="replace").lstrip())
    except ValueError:
        return {}
    return usage if isinstance(usage, dict) else {}


def tokens_of(usage: dict[str, Any]) -> int:
    """Return the total in an engine's `usage`, 0 if it gives none."""
    total = usage.get("total_tokens")
    return total if type(total) is int and total > 0 else 0
