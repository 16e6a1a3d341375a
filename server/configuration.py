"""The configuration file: the models that clients may name, and the tenants with their keys and limits."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)

from server.aliases import FINEST_RETENTION, Alias
from server.errors import ConfigurationError

NO_DIGEST = "0" * 64
"""What stands for a key's SHA-256 in examples."""
EMPTY_DIGEST = hashlib.sha256(b"").hexdigest()


class Section(BaseModel):
    """A section of the file. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _hundredths(value: float) -> float:
    if round(value, 2) != value:
        raise ValueError("must have at most two decimals")
    return float(value)


Share = Annotated[StrictFloat | StrictInt, Field(ge=FINEST_RETENTION, le=1), AfterValidator(_hundredths)]
ModelName = Annotated[str, Field(min_length=1, max_length=200)]
TenantName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]  # also a directory name and a metric label
PresetName = Annotated[StrictStr, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
Amount = Annotated[StrictInt, Field(ge=1)]


class ModelEntry(Section):
    """The entry of one model."""

    engine_model: Annotated[str, Field(min_length=1)]
    retention: Share | None = None
    min_retention: Share | None = None
    max_retention: Share | None = None
    max_frames: Amount | None = None
    preset: PresetName | None = None

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        low, high = self.min_retention or 0.0, self.max_retention or 1.0
        if low > high:
            raise ValueError(f"min_retention must not be above max_retention, got {low:g} and {high:g}")
        if self.retention is not None and not low <= self.retention <= high:
            raise ValueError(f"retention must be in [{low:g}, {high:g}], got {self.retention:g}")
        return self

    def alias(self, name: str) -> Alias:
        """Return the alias that this entry defines under `name`."""
        return Alias(
            name,
            self.engine_model,
            self.retention,
            self.min_retention or 0.0,
            self.max_retention or 1.0,
            self.max_frames,
            self.preset,
        )


class Key(Section):
    """An API key, of which the file holds the SHA-256 only."""

    sha256: Annotated[StrictStr, Field(pattern=r"^[0-9a-f]{64}$", repr=False)]
    expires: AwareDatetime | date | None = None

    def is_valid_at(self, moment: datetime) -> bool:
        """Return whether the key has not yet expired. A date without a time means 00:00 UTC on that day."""
        if self.expires is None:
            return True
        if isinstance(self.expires, datetime):
            return moment < self.expires
        return moment < datetime.combine(self.expires, time(), UTC)


class Limits(Section):
    """Limits for one minute, and for requests at the same time. A limit that is None does not apply."""

    requests_per_minute: Amount | None = None
    tokens_per_minute: Amount | None = None
    video_seconds_per_minute: Amount | None = None
    concurrent_requests: Amount | None = None


class Tenant(Section):
    """A tenant: its keys, the models it may use (None: all of them) and its limits (None: those of the file)."""

    keys: Annotated[tuple[Key, ...], Field(min_length=1)]
    models: tuple[ModelName, ...] | None = None
    limits: Limits | None = None


class Configuration(Section):
    """The whole file. Without a file, the gateway offers every model of its engines, and needs no key."""

    models: Annotated[dict[ModelName, ModelEntry], Field(min_length=1)] | None = None
    tenants: Annotated[dict[TenantName, Tenant], Field(min_length=1)] | None = None
    limits: Limits = Limits()
    metrics_keys: Annotated[tuple[Key, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _check_references(self) -> Self:
        for name, tenant in (self.tenants or {}).items():
            for model in tenant.models or ():
                if self.models is not None and model not in self.models:
                    raise ValueError(f"tenants.{name}.models: must be among the models of the file, got {model!r}")
        counts = Counter(key.sha256 for _, key in self._keys())
        if counts and max(counts.values()) > 1:
            raise ValueError("the same key must not be listed twice")
        return self

    def _keys(self) -> Iterator[tuple[str, Key]]:
        for name, tenant in (self.tenants or {}).items():
            for place, key in enumerate(tenant.keys):
                yield f"tenants.{name}.keys[{place}]", key
        for place, key in enumerate(self.metrics_keys or ()):
            yield f"metrics_keys[{place}]", key

    def useless_keys(self, moment: datetime) -> list[str]:
        """Return a sentence for each key that opens nothing at `moment`: its place in the file, and why."""
        told = []
        for place, key in self._keys():
            if key.sha256 == NO_DIGEST:
                told.append(f"{place}: the sha256 of zeros stands for no key; python -m server.keys makes one")
            elif key.sha256 == EMPTY_DIGEST:
                told.append(f"{place}: this is the sha256 of nothing, which is no key")
            elif not key.is_valid_at(moment):
                told.append(f"{place}: the key has expired ({key.expires})")
        return told

    @property
    def aliases(self) -> dict[str, Alias] | None:
        """The aliases by name. None if the file has no `models`."""
        if self.models is None:
            return None
        return {name: entry.alias(name) for name, entry in self.models.items()}

    def limits_of(self, tenant: str) -> Limits:
        """Return the limits of `tenant`. A tenant without limits of its own has those of the file.

        Without tenants, all requests together have the limits of the file.
        """
        entry = (self.tenants or {}).get(tenant)
        return self.limits if entry is None or entry.limits is None else entry.limits


def load(path: Path) -> Configuration:
    """Return the configuration in the file at `path`.

    Raises ConfigurationError, which names the file and the key, if the file is missing or wrong.
    """
    return parsed(content_of(path), path)


def content_of(path: Path) -> bytes:
    """Return what is in the file; raise ConfigurationError if it can't be read."""
    try:
        return path.read_bytes()
    except OSError as exc:
        raise ConfigurationError(f"{path}: can't be read ({exc.strerror})") from exc


def parsed(text: bytes, path: Path) -> Configuration:
    """Return the configuration in `text`; raise ConfigurationError, which names `path` and the key, if it is wrong."""
    try:
        content: Any = yaml.safe_load(text.decode())
    except (UnicodeDecodeError, yaml.YAMLError) as exc:
        where = getattr(exc, "problem_mark", None)  # the line number only: the text there may be a secret
        line = "" if where is None else f" (line {where.line + 1})"
        raise ConfigurationError(f"{path}: is not YAML{line}") from exc
    try:
        return Configuration.model_validate(content)
    except ValidationError as exc:
        raise ConfigurationError("\n".join(f"{path}: {_explain(error)}" for error in exc.errors())) from exc


def _explain(error: Mapping[str, Any]) -> str:
    steps = [str(step) for step in error["loc"] if step not in _INSIDE_PYDANTIC]
    key = ".".join(steps) or "the file"
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key"
    if "sha256" in steps:  # no value in the message: if the operator wrote the key itself, it must not reach a log
        return f"{key}: must be a key's SHA-256, 64 lower-case hexadecimal digits; python -m server.keys makes one"
    message = str(error["msg"]).removeprefix("Value error, ")
    shown = "" if isinstance(error["input"], dict | list) else f", got {error['input']!r}"
    return f"{key}: {message[0].lower()}{message[1:]}{shown}"


_INSIDE_PYDANTIC = ("float", "int", "date", "datetime", "[key]")
