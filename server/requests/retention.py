"""The retention that a bound on tokens comes to, once the videos of a request are known, and what would fit a model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from server.aliases import Target
from server.engines.profile import VideoRules
from server.errors import ContextExceeded, RetentionRefused
from server.media.intake import Taken
from server.media.shape import VideoShape


def settle_retention(target: Target, rules: VideoRules | None, videos: Sequence[VideoShape]) -> Target:
    """Return the target with the largest retention, in hundredths, at which the videos fit its bound on tokens.

    A target without such a bound is returned as it is. Raises RetentionRefused if even the smallest retention that is
    allowed keeps more tokens, or if the engine doesn't tell how it counts.
    """
    if target.max_tokens is None:
        return target
    if not videos:
        return replace(target, max_tokens=None)
    if rules is None:
        raise RetentionRefused(
            "aot.tokens can't be used with this model: its engine doesn't tell how it counts; use aot.retention",
            param="aot.tokens",
        )
    retention, least = largest_fitting(target, rules, videos, target.max_tokens)
    if retention is not None:
        return replace(target, retention=retention, max_tokens=None)
    raise RetentionRefused(
        f"aot.tokens must be at least {least} for these videos, got {target.max_tokens}", param="aot.tokens"
    )


def largest_fitting(
    target: Target, rules: VideoRules, videos: Sequence[VideoShape], room: int
) -> tuple[float | None, int]:
    """Return the largest retention, in hundredths, at which videos have at most `room` tokens, and those tokens.

    None if there is no such retention within the target's bounds, with the tokens at the smallest one.
    """
    tokens = 0
    for hundredths in range(round(target.max_retention * 100), round(target.min_retention * 100) - 1, -1):
        tokens = sum(video.tokens_after(rules, hundredths / 100) for video in videos)
        if tokens <= room:
            return hundredths / 100, tokens
    return None, tokens


def answer_tokens(fields: Mapping[str, Any], length_fields: Sequence[str]) -> int:
    """Return how many tokens a request leaves for its answer, at least 1."""
    asked = [fields.get(name) for name in length_fields]
    return max([1, *(value for value in asked if type(value) is int)])


@contextmanager
def telling_what_fits(target: Target, taken: Taken, *, answer: int) -> Iterator[None]:
    """Add to a ContextExceeded that leaves the block which retention would fit, if the prompt is long by its videos.

    `answer` is the number of tokens that the answer needs.
    """
    try:
        yield
    except ContextExceeded as exc:
        if taken.video_seconds == 0 and not taken.shapes:
            raise
        advice = _advice(exc, target, taken, answer)
        raise ContextExceeded(
            prompt_tokens=exc.prompt_tokens, context_tokens=exc.context_tokens, advice=advice
        ) from exc


def _advice(exc: ContextExceeded, target: Target, taken: Taken, answer: int) -> str:
    rules, reduction, shapes = taken.rules, taken.reduction, taken.shapes
    if rules is None or reduction is None:
        return ": ask for a smaller aot.retention, or send fewer or shorter videos"
    if not reduction.active:
        return ": ask for fewer aot.frames, or send fewer or shorter videos"
    settled = settle_retention(target, rules, shapes).retention
    used = sum(shape.tokens_after(rules, settled or reduction.retention) for shape in shapes)
    told = f", {used} of them of videos"
    for needed in (answer, 1):
        room = exc.context_tokens - (exc.prompt_tokens - used) - needed
        retention, least = largest_fitting(target, rules, shapes, room)
        if retention is not None:
            return f"{told}: it would fit with aot.retention {retention:g} at most, or with aot.tokens {room} at most"
    if room < 1:
        return f"{told}: the text alone is too long"
    return (
        f"{told}: even with aot.retention {target.min_retention:g} they would have {least}, and there is room for "
        f"{room}; ask for fewer aot.frames, or send fewer or shorter videos"
    )
