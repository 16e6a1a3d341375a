"""What llm-d's router wants to know of a request's videos, which it can't look into itself."""

from server.media.facts import Facts


def video_headers(video: Facts, *, retention: float | None) -> dict[str, str]:
    """Return the headers from which llm-d estimates a video's tokens: duration in seconds, WxH, frames per second.

    Its estimate grows with the duration, which is therefore scaled by the share of tokens that are kept; None, the
    engine's own default, is taken for all of them.
    """
    seconds = video.duration_seconds * (1.0 if retention is None else retention)
    headers = {
        "x-llm-d-video-duration-seconds": f"{seconds:.3f}",
        "x-llm-d-video-resolution": f"{video.width}x{video.height}",
    }
    if video.fps:
        headers["x-llm-d-video-fps"] = f"{video.fps:.3f}"
    return headers
