"""The retention that a bound on tokens comes to, once the videos of a request are known."""

from collections.abc import Sequence
from dataclasses import replace

from server.aliases import Target
from server.engines.profile import VideoRules
from server.errors import RetentionRefused
from server.media.shape import VideoShape


def settle_retention(target: Target, rules: VideoRules | None, videos: Sequence[VideoShape]) -> Target:
    """Return the target with the largest retention, in hundredths, at which the videos fit its bound on tokens.

    A target without such a bound is returned as it is. Raises RetentionRefused if even the smallest retention that is
    allowed keeps more tokens, or if the engine doesn't tell how it counts.
    """
    if target.max_tokens is None or not videos:
        return replace(target, max_tokens=None)
    if rules is None:
        raise RetentionRefused(
            "aot.tokens can't be used with this model: its engine doesn't tell how it counts; use aot.retention",
            param="aot.tokens",
        )
    least = 0
    for hundredths in range(round(target.max_retention * 100), round(target.min_retention * 100) - 1, -1):
        least = sum(video.tokens_after(rules, hundredths / 100) for video in videos)
        if least <= target.max_tokens:
            return replace(target, retention=hundredths / 100, max_tokens=None)
    raise RetentionRefused(
        f"aot.tokens must be at least {least} for these videos, got {target.max_tokens}", param="aot.tokens"
    )
