"""Reading an answer's stream against the clock."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    """The content of a stream, with its times in seconds on the clock of the reader."""

    first_token: float | None = None
    gaps: list[float] = field(default_factory=list)
    """Between chunks with output."""
    usage: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None
    """Why it is no whole answer."""

    def tokens(self) -> dict[str, int]:
        """Return what the engine counted; of video only where the gateway reported it."""
        counts = {"prompt": self.usage.get("prompt_tokens"), "answer": self.usage.get("completion_tokens")}
        video = self.usage.get("video_tokens") or {}
        counts |= {"video before": video.get("before"), "video after": video.get("after")}
        return {name: count for name, count in counts.items() if count is not None}


def read_answer(lines: Iterable[bytes], clock: Callable[[], float]) -> Answer:
    """Return the answer in the lines of an event stream, timed as they come."""
    answer = Answer()
    latest = 0.0
    is_complete = False
    for line in lines:
        if not line.startswith(b"data:"):
            continue
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            is_complete = True
            continue
        event = json.loads(data)
        if error := event.get("error"):
            answer.problem = f"error in the stream: {error.get('code')}"
            return answer
        answer.usage = event.get("usage") or answer.usage
        if _has_output(event):
            now = clock()
            if answer.first_token is None:
                answer.first_token = now
            else:
                answer.gaps.append(now - latest)
            latest = now
    if not is_complete:
        answer.problem = "the stream broke off"
    elif answer.first_token is None:
        answer.problem = "the stream held no token"
    return answer


def _has_output(event: dict[str, Any]) -> bool:
    """Return whether a chunk carries text; the first one only names the role."""
    return any(choice["delta"].get("content") or choice["delta"].get("reasoning") for choice in event["choices"])
