"""What lmms-eval asks of the local task: its videos, its questions, whether an answer is right."""

from __future__ import annotations

from typing import Any


def doc_to_visual(doc: dict[str, Any]) -> list[str]:
    """Return the path of the clip."""
    return [doc["video"]]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    """Return the question."""
    return str(doc["question"])


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return whether the answer is the known one, to the letter."""
    return {"accuracy": float(results[0].strip() == doc["answer"])}
