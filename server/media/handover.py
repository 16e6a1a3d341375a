"""How a request's videos are handed to the engine: which frames are sampled, and at which size."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from server.aliases import Sampling
from server.engines.profile import FRAMES_FORMAT, SmartResize, UniformSampling, VideoRules
from server.errors import SamplingRefused
from server.reader.wanted import Wanted


@dataclass(frozen=True)
class Handover:
    """The rules of the model's engines, and what the request asks for within them."""

    rules: VideoRules
    sampling: Sampling
    full_size: bool
    """Whether frames keep their size, whatever the model's processor makes of them."""

    @property
    def most_frames(self) -> int:
        """The most frames that a request may ask for.

        That is the alias's bound or the model's own. It is never more than the engine has profiled its memory with,
        unless the model samples more frames by itself.
        """
        own = self.rules.sampling
        default = own.num_frames if isinstance(own, UniformSampling) else own.max_frames
        profiled = max(default or 1, self.rules.max_frames)
        return min(self.sampling.max_frames or default or profiled, profiled)

    @property
    def likely_bytes(self) -> int:
        """The bytes that the frames of a large video take."""
        size, pixels = self.rules.size, 4096 * 2304
        if isinstance(size, SmartResize):
            pixels = size.max_pixels // (self.most_frames if size.over == "video" else 1)
        elif not self.full_size:
            pixels = size.height * size.width
        return self.most_frames * pixels * 3

    def wanted(self, *, max_bytes: int) -> Wanted:
        """Return what the reader is asked for; the frames of a video take at most `max_bytes`."""
        asked_for_rate = self.sampling.fps is not None
        return Wanted(
            # without a wish of the request's, exactly the frames that the engine would sample itself
            sampling=self.rules.sampling.spec(self.most_frames if asked_for_rate else self.sampling.max_frames),
            size=None if self.full_size else self.rules.size.model_dump(),
            max_bytes=max_bytes,
            start=self.sampling.start_seconds or 0.0,
            end=self.sampling.end_seconds,
            num_frames=self.sampling.frames,
            fps=self.sampling.fps,
        )

    def name_of(self, digest: str) -> str:
        """Return the name, 64 hexadecimal digits, of the frames of the video with this SHA-256.

        All that decides which bytes the engine gets is in it.
        """
        told: dict[str, Any] = {"video": digest, "format": FRAMES_FORMAT, **asdict(self.wanted(max_bytes=0))}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def handover(rules: VideoRules | None, sampling: Sampling, *, full_size: bool) -> Handover | None:
    """Return how videos are handed over; None if the engine gets the videos themselves.

    Raises SamplingRefused if the request asks for frames that these engines can't be given.
    """
    if rules is None:
        for name, value in (
            ("frames", sampling.frames),
            ("fps", sampling.fps),
            ("start", sampling.start_seconds),
            ("end", sampling.end_seconds),
        ):
            if value is not None:
                raise SamplingRefused(
                    f"aot.{name} can't be used with this model: its engine samples videos itself", param=f"aot.{name}"
                )
        return None
    way = Handover(rules, sampling, full_size)
    if sampling.frames is not None and sampling.frames > way.most_frames:
        raise SamplingRefused(
            f"aot.frames must be in [1, {way.most_frames}] for this model, got {sampling.frames}", param="aot.frames"
        )
    return way
