"""The names clients know models by, and the retention each one allows."""

from collections.abc import Iterable
from dataclasses import dataclass

from server.errors import RetentionRefused

FINEST_RETENTION = 0.01  # engines key their caches by retention in hundredths; finer steps would only miss


@dataclass(frozen=True)
class Target:
    """What one request is answered by: the engine's name for a model, and the retention that it gets.

    `retention` is in hundredths; None is the engine's own default.
    """

    engine_model: str
    retention: float | None


@dataclass(frozen=True)
class Alias:
    """A model as clients name it: the engine's name for it, and the retention it gives and allows."""

    name: str
    engine_model: str
    retention: float | None = None
    min_retention: float = 0.0
    max_retention: float = 1.0

    def target(self, asked: float | None = None) -> Target:
        """Return what answers a request that asks for a retention, or for none.

        Raises RetentionRefused if `asked` lies outside the bounds of the alias.
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
    """Return an alias of the same name for each engine model, for gateways without a configuration file."""
    return {model: Alias(model, model) for model in models}
