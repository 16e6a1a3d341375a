"""The names clients know models by, and the retention each one allows."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    ValidationError,
    model_validator,
)

from server.errors import ConfigurationError, RetentionRefused

FINEST_RETENTION = 0.01  # engines key their caches by retention in hundredths; finer steps would only miss


@dataclass(frozen=True)
class Alias:
    """A model as clients name it: the engine's name for it, and the retention it gives and allows."""

    name: str
    engine_model: str
    retention: float | None = None
    min_retention: float = 0.0
    max_retention: float = 1.0

    def retention_for(self, asked: float | None) -> float | None:
        """Return the retention in hundredths that a request gets, None for the engine's own default.

        Raises RetentionRefused if `asked` lies outside the bounds of the alias.
        """
        if asked is None:
            return self.retention
        if not (asked > 0 and self.min_retention <= asked <= self.max_retention):
            low = f"[{self.min_retention:g}" if self.min_retention > 0 else "(0"
            raise RetentionRefused(
                f"aot.retention must be in {low}, {self.max_retention:g}] for this model, got {asked:g}",
                param="aot.retention",
            )
        return max(FINEST_RETENTION, round(asked, 2))


def _hundredths(value: float) -> float:
    if round(value, 2) != value:
        raise ValueError("must have at most two decimals")
    return float(value)


Share = Annotated[StrictFloat | StrictInt, Field(ge=FINEST_RETENTION, le=1), AfterValidator(_hundredths)]


class ModelEntry(BaseModel):
    """One model in the configuration file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    engine_model: Annotated[str, Field(min_length=1)]
    retention: Share | None = None
    min_retention: Share | None = None
    max_retention: Share | None = None

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        low, high = self.min_retention or 0.0, self.max_retention or 1.0
        if low > high:
            raise ValueError(f"min_retention must not be above max_retention, got {low:g} and {high:g}")
        if self.retention is not None and not low <= self.retention <= high:
            raise ValueError(f"retention must be in [{low:g}, {high:g}], got {self.retention:g}")
        return self

    def alias(self, name: str) -> Alias:
        """Return the entry under its name."""
        return Alias(name, self.engine_model, self.retention, self.min_retention or 0.0, self.max_retention or 1.0)


class ConfigFile(BaseModel):
    """The configuration file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: Annotated[dict[Annotated[str, Field(min_length=1, max_length=200)], ModelEntry], Field(min_length=1)]


def load_aliases(path: Path) -> dict[str, Alias]:
    """Return the aliases in the file at `path`; raise ConfigurationError naming the file and the key otherwise."""
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigurationError(f"{path}: can't be read ({exc.strerror})") from exc
    except (UnicodeDecodeError, yaml.YAMLError) as exc:
        raise ConfigurationError(f"{path}: is not YAML: {' '.join(str(exc).split())}") from exc
    try:
        parsed = ConfigFile.model_validate(content)
    except ValidationError as exc:
        raise ConfigurationError("\n".join(f"{path}: {_explain(error)}" for error in exc.errors())) from exc
    return {name: entry.alias(name) for name, entry in parsed.models.items()}


def _explain(error: Any) -> str:
    key = ".".join(str(step) for step in error["loc"] if step not in ("float", "int")) or "the file"
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key"
    message = str(error["msg"]).removeprefix("Value error, ")
    shown = "" if isinstance(error["input"], dict) else f", got {error['input']!r}"
    return f"{key}: {message[0].lower()}{message[1:]}{shown}"


def pass_through(models: Iterable[str]) -> dict[str, Alias]:
    """Return an alias of the same name for each engine model, for gateways without a configuration file."""
    return {model: Alias(model, model) for model in models}
