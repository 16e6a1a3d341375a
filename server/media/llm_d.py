"""Headers that describe a request's video to llm-d's router, which does not open videos itself."""

from server.reader.facts import Facts


def video_headers(video: Facts, *, retention: float | None) -> dict[str, str]:
    """Return the headers from which llm-d estimates a video's tokens: duration in seconds, WxH, frames per second.

    The estimate is proportional to the duration. So the duration is multiplied by `retention`, to account for the
    tokens that are dropped. If `retention` is None, the engine's default is unknown here and counts as 1.
    """
    seconds = video.duration_seconds * (1.0 if retention is None else retention)
    headers = {
        "x-llm-d-video-duration-seconds": f"{seconds:.3f}",
        "x-llm-d-video-resolution": f"{video.width}x{video.height}",
    }
    if video.fps:
        headers["x-llm-d-video-fps"] = f"{video.fps:.3f}"
    return headers
