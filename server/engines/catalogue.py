"""The models that clients may name: the operator's aliases or, without aliases, the engines' own models."""

import time
from collections.abc import Callable, Collection, Mapping
from typing import Literal

from pydantic import BaseModel

from server.aliases import Alias, pass_through
from server.engines.pool import EnginePool
from server.errors import EngineUnavailable, ModelNotServed, UnknownModel

MOST_SHOWN = 20  # models, in the error about one that there isn't


class RetentionBounds(BaseModel):
    """The default retention of a model, the range that a request may choose from, and the preset."""

    retention: float | None
    min_retention: float
    max_retention: float
    engine_retention: float | None
    """What engines keep if neither the request nor the model says; None if they do not tell, or differ."""
    preset: str | None
    """How engines choose and merge tokens; None if they do not tell, or differ."""


class ModelCard(BaseModel):
    """OpenAI's model object."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["aot-gateway"] = "aot-gateway"
    aot: RetentionBounds
    max_model_len: int | None
    """The longest context in tokens. None as long as no engine has reported it."""


class ModelList(BaseModel):
    """The models that a tenant may use."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Catalogue:
    """Looks models up by name. The models of engines that are down are still known, those that no engine serves not."""

    def __init__(self, *, aliases: Callable[[], Mapping[str, Alias] | None], pool: EnginePool) -> None:
        """Offer what `aliases` returns or, for None, every model of the pool's engines under its own name."""
        self._find_aliases = aliases
        self._pool = pool
        self._created = int(time.time())

    @property
    def names(self) -> Collection[str]:
        """The names of all models."""
        return self._offered().keys()

    def resolve(self, name: str, *, allowed: Collection[str] | None = None) -> Alias:
        """Return the alias called `name`.

        `allowed` are the models that the tenant may use (None: all). For that tenant, the others do not exist.
        Raises UnknownModel, EngineUnavailable if the engines that may serve the model have not reported yet, or
        ModelNotServed if none of them serves the model of the alias.
        """
        aliases = self._find_aliases()
        alias = Alias(name, name) if aliases is None else aliases.get(name)
        if alias is not None and self._pool.lists(alias.engine_model) and (allowed is None or name in allowed):
            return alias
        offered = self._offered()
        is_alias = name in (aliases or ()) and (allowed is None or name in allowed)
        if aliases is None or is_alias:
            if not self._pool.models or (is_alias and not self._pool.all_seen):
                raise EngineUnavailable("no engine is available, try again later")
            if is_alias:
                raise ModelNotServed("no engine serves this model, which only the operator can change")
        usable = sorted(offered if allowed is None else allowed & offered.keys())
        shown = ", ".join(usable[:MOST_SHOWN]) + (", …" if len(usable) > MOST_SHOWN else "")
        raise UnknownModel(
            f"the model {name[:200]!r} does not exist; the models that you may use: {shown or 'none'}", param="model"
        )

    def cards(self, *, allowed: Collection[str] | None = None) -> list[ModelCard]:
        """Return the cards of all models, or of those in `allowed`."""
        return [self._card(alias) for name, alias in self._offered().items() if allowed is None or name in allowed]

    def card(self, name: str, *, allowed: Collection[str] | None = None) -> ModelCard:
        """Return the card of one model; raises the errors of `resolve`."""
        return self._card(self.resolve(name, allowed=allowed))

    def _offered(self) -> Mapping[str, Alias]:
        """Return the aliases that an engine serves or has served last, or the engines' own models without aliases."""
        served, aliases = self._pool.models, self._find_aliases()
        if aliases is None:
            return pass_through(served)
        return {name: alias for name, alias in aliases.items() if alias.engine_model in served}

    def _card(self, alias: Alias) -> ModelCard:
        length = self._pool.models.get(alias.engine_model, {}).get("max_model_len")
        return ModelCard(
            id=alias.name,
            created=self._created,
            aot=RetentionBounds(
                retention=alias.retention,
                min_retention=alias.min_retention,
                max_retention=alias.max_retention,
                engine_retention=self._pool.retention(alias.engine_model),
                preset=alias.preset or self._pool.preset(alias.engine_model),
            ),
            max_model_len=length if isinstance(length, int) else None,
        )
