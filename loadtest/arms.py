"""The arms of a load test: models of the gateway, by name or with the retention of the request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

QUESTION = "What happens in the video?"
TEXT_QUESTION = "What makes a video easy to follow?"


@dataclass(frozen=True)
class Arm:
    """One way of asking."""

    name: str
    model: str
    retention: float | None = None

    def request(self, video_url: str | None, *, max_tokens: int) -> dict[str, Any]:
        """Return a chat request, streamed with usage; without a video one in text."""
        content: list[dict[str, Any]] = [{"type": "text", "text": TEXT_QUESTION}]
        if video_url is not None:
            content = [{"type": "video_url", "video_url": {"url": video_url}}, {"type": "text", "text": QUESTION}]
        asked = {} if self.retention is None else {"aot": {"retention": self.retention}}
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **asked,
        }


def arms_in(text: str) -> list[Arm]:
    """Return the arms in text like `off=llava@1,aot=llava-fast`; raise ValueError."""
    arms = []
    for item in text.split(","):
        name, _, rest = item.strip().partition("=")
        model, at, retention = rest.partition("@")
        try:
            arm = Arm(name, model, float(retention) if at else None)
        except ValueError:
            arm = Arm("", "")
        if not (arm.name and arm.model) or not 0 < (1.0 if arm.retention is None else arm.retention) <= 1:
            raise ValueError(f"arms must be like off=MODEL@1,aot=MODEL@0.10 or aot=ALIAS, got {text}")
        arms.append(arm)
    if len({arm.name for arm in arms}) != len(arms):
        raise ValueError(f"each arm must have a name of its own, got {text}")
    return arms
