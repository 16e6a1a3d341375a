"""The names clients know models by, and what a request may ask of each: the retention, and which frames are sampled."""

from collections.abc import Iterable
from dataclasses import dataclass

from server.errors import RetentionRefused, SamplingRefused

FINEST_RETENTION = 0.01  # engines cache results by retention in hundredths: finer steps would only add cache misses


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video a request asks for; None leaves it to the model."""

    frames: int | None = None
    fps: float | None = None
    start_seconds: float | None = None
    end_seconds: float | None = None
    """Frames before `start_seconds` and from `end_seconds` on are not sampled."""
    max_frames: int | None = None
    """The operator's bound on frames; None is the model's own."""

    @property
    def is_default(self) -> bool:
        """Whether all is left to the model."""
        return self == Sampling()


@dataclass(frozen=True)
class Asked:
    """What a request asks for in `aot`."""

    retention: float | None = None
    tokens: int | None = None
    """At most so many video tokens in all; the retention follows."""
    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class Target:
    """What one request is answered by: the engine's name for a model, the retention, the preset and the frames it gets.

    `retention` is in hundredths. A retention or a preset of None is the engine's own. `max_tokens`, if set, decides the
    retention once the videos are known, between `min_retention` and `max_retention`.
    """

    engine_model: str
    retention: float | None = None
    max_tokens: int | None = None
    min_retention: float = FINEST_RETENTION
    max_retention: float = 1.0
    sampling: Sampling = Sampling()
    preset: str | None = None

    @property
    def processor_kwargs(self) -> dict[str, object]:
        """What tells the engine the retention and the preset, as `mm_processor_kwargs`; empty if it decides both."""
        kwargs = {"aot_retention": self.retention, "aot_preset": self.preset}
        return {name: value for name, value in kwargs.items() if value is not None}


@dataclass(frozen=True)
class Alias:
    """A model as clients name it: the engine's name for it, and what it gives and allows."""

    name: str
    engine_model: str
    retention: float | None = None
    min_retention: float = 0.0
    max_retention: float = 1.0
    max_frames: int | None = None
    preset: str | None = None
    """How the engine chooses and merges tokens, by the name that it has there."""

    def target(self, asked: Asked | None = None) -> Target:
        """Return what answers a request.

        Raises RetentionRefused or SamplingRefused if what is asked lies outside the bounds of the alias.
        """
        asked = asked or Asked()
        return Target(
            self.engine_model,
            self._retention(asked.retention) if asked.tokens is None else None,
            max_tokens=asked.tokens,
            min_retention=max(FINEST_RETENTION, self.min_retention),
            max_retention=self.max_retention,
            sampling=self._sampling(asked.sampling),
            preset=self.preset,
        )

    def _retention(self, asked: float | None) -> float | None:
        if asked is None:
            return self.retention
        if not (asked > 0 and self.min_retention <= asked <= self.max_retention):
            low = f"[{self.min_retention:g}" if self.min_retention > 0 else "(0"
            raise RetentionRefused(
                f"aot.retention must be in {low}, {self.max_retention:g}] for this model, got {asked:g}",
                param="aot.retention",
            )
        return max(FINEST_RETENTION, round(asked, 2))

    def _sampling(self, asked: Sampling) -> Sampling:
        if self.max_frames is None:
            return asked
        if asked.frames is not None and asked.frames > self.max_frames:
            raise SamplingRefused(
                f"aot.frames must be in [1, {self.max_frames}] for this model, got {asked.frames}", param="aot.frames"
            )
        return Sampling(asked.frames, asked.fps, asked.start_seconds, asked.end_seconds, self.max_frames)


def pass_through(models: Iterable[str]) -> dict[str, Alias]:
    """Return an alias of the same name for each engine model, for gateways that define no aliases."""
    return {model: Alias(model, model) for model in models}
