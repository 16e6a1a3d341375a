"""Refuses fields that would do nothing where they stand, and names the fields that do what their sender wants."""

from collections.abc import Mapping
from typing import Any, Final

from server.errors import InvalidRequest

CODE: Final = "misplaced_field"
_FRAMES: Final = "aot.frames"
_TOKENS: Final = "aot.retention, aot.tokens or aot.frames"
VIDEO_FIELDS: Final = {
    "retention": "aot.retention",
    "aot_retention": "aot.retention",
    "video_pruning_rate": "aot.retention (the share that is kept)",
}
"""Fields of a request that nobody reads, and the fields to use."""
_BESIDE_VIDEOS: Final = {
    **VIDEO_FIELDS,
    "fps": "aot.fps",
    **dict.fromkeys(("frames", "num_frames", "nframes", "max_frames", "min_frames"), _FRAMES),
    **dict.fromkeys(("start", "video_start", "start_time", "start_offset"), "aot.start"),
    **dict.fromkeys(("end", "video_end", "end_time", "end_offset"), "aot.end"),
    **dict.fromkeys(("detail", "media_resolution", "min_pixels", "max_pixels", "total_pixels"), _TOKENS),
    **dict.fromkeys(("resized_height", "resized_width"), _TOKENS),
    **dict.fromkeys(("tokens", "max_video_tokens"), "aot.tokens"),
    "video_metadata": "aot.fps, aot.start and aot.end",
}
"""Fields beside a video, in its part or in its request, that nobody reads."""


def refuse_idle_fields(fields: Mapping[str, Any], *, has_video: bool) -> None:
    """Raise InvalidRequest if a field of a request would do nothing, although its name says that it does something."""
    if fields.get("extra_body") is not None:
        raise InvalidRequest(
            "extra_body is an argument of OpenAI's SDKs, not a field of requests: send what it holds as fields of the "
            'request, such as {"model": …, "aot": {"retention": 0.15}}',
            param="extra_body",
            code=CODE,
        )
    _refuse(fields, _BESIDE_VIDEOS if has_video else VIDEO_FIELDS, where="")


def refuse_idle_keys_of_video(holder: Mapping[str, Any], where: str) -> None:
    """Raise InvalidRequest if a key beside a video, in its part, would do nothing although its name says it does."""
    _refuse(holder, _BESIDE_VIDEOS, where=f"{where}.")
    if holder.get("aot") is not None:
        raise InvalidRequest(
            "aot has no effect in a part: send it beside messages; it holds for all videos of the request",
            param=f"{where}.aot",
            code=CODE,
        )


def _refuse(holder: Mapping[str, Any], places: Mapping[str, str], *, where: str) -> None:
    for name, place in places.items():
        if holder.get(name) is not None:
            raise InvalidRequest(
                f"{where}{name} has no effect: use {place}, in the request's field aot",
                param=f"{where}{name}",
                code=CODE,
            )
