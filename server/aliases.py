"""Model aliases: the names that clients use for models, and the retention that each alias allows."""

from collections.abc import Iterable
from dataclasses import dataclass

from server.errors import RetentionRefused

FINEST_RETENTION = 0.01  # engines cache results by retention in hundredths: finer steps would only add cache misses


@dataclass(frozen=True)
class Target:
    """What a request becomes at the engine: the engine's name for the model, and the retention.

    `retention` is a multiple of 0.01. None means the engine's own default.
    """

    engine_model: str
    retention: float | None


@dataclass(frozen=True)
class Alias:
    """A model under the name that clients use.

    `retention` is the default for requests that name none. A request may choose any value from `min_retention` to
    `max_retention`.
    """

    name: str
    engine_model: str
    retention: float | None = None
    min_retention: float = 0.0
    max_retention: float = 1.0

    def target(self, asked: float | None = None) -> Target:
        """Return the target of a request that asks for the retention `asked`. None means the alias's default.

        Raises RetentionRefused if `asked` is outside the bounds of the alias.
        """
        if asked is None:
            return Target(self.engine_model, self.retention)
        if not (asked > 0 and self.min_retention <= asked <= self.max_retention):
            low = f"[{self.min_retention:g}" if self.min_retention > 0 else "(0"
            raise RetentionRefused(
                f"aot.retention must be in {low}, {self.max_retention:g}] for this model, got {asked:g}",
                param="aot.retention",
            )
        return Target(self.engine_model, max(FINEST_RETENTION, round(asked, 2)))


def pass_through(models: Iterable[str]) -> dict[str, Alias]:
    """Return an alias of the same name for each engine model, for gateways that define no aliases."""
    return {model: Alias(model, model) for model in models}
