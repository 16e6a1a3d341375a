"""How many tokens an engine says a request used."""

import json
from typing import Any

_MARK = b'"usage":'  # inside a string of JSON its quotes would be escaped


def tokens_of(usage: Any) -> int:
    """Return the total in an engine's `usage`, 0 if there is none."""
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    return total if type(total) is int and total > 0 else 0


def tokens_in(body: bytes) -> int:
    """Return the total in an engine's answer, 0 if it gives none; the rest of it, maybe megabytes, is not parsed."""
    _, mark, rest = body.rpartition(_MARK)
    if not mark:
        return 0
    try:
        usage, _ = json.JSONDecoder().raw_decode(rest.decode("utf-8", errors="replace").lstrip())
    except ValueError:
        return 0
    return tokens_of(usage)
