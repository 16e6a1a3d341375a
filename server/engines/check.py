"""Examines an engine: whether it is set up for what the gateway asks of it."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Literal

from server.engines.profile import EngineProfile

Check = Literal[
    "key", "models", "plugin", "frames", "reduction", "presets", "request_kwargs", "prompt_details", "limits"
]

REMEDIES: Final[dict[Check, str]] = {
    "key": "the engine refuses the gateway's API key: give the gateway the engine's --api-key (ENGINE_KEY_FILE)",
    "models": "the engine serves no model that the gateway offers: compare its --served-model-name with engine_model",
    "plugin": "the engine runs without the plugin: videos are served whole, or as its own settings say; "
    "install aot-vllm there and set VLLM_PLUGINS=aot",
    "frames": "the engine's plugin speaks another version of the frames format: it is handed videos as they are",
    "reduction": "the engine reduces no videos: start it with --video-pruning-rate",
    "presets": "the engine refuses the preset of an alias: list it under allowed_presets in the engine's aot settings, "
    "or take it out of the alias",
    "request_kwargs": "the engine refuses retentions: start it with --trust-request-mm-kwargs",
    "prompt_details": "the engine's usage lacks the tokens by kind: start it with --enable-prompt-tokens-details",
    "limits": "the engine takes less than the gateway lets through: compare MEDIA_MAX_DECODED_BYTES and "
    "MAX_OUTPUT_TOKENS with the limits in this line",
}
"""What it means that a check fails, and what the operator does about it."""


@dataclass(frozen=True)
class Wanted:
    """What the gateway asks of its engines."""

    models: frozenset[str] | None = None
    """The engines' models that aliases name. None if the gateway offers whatever engines serve."""
    presets: frozenset[tuple[str, str]] = frozenset()
    """The presets that aliases name, each behind the engines' model."""
    decoded_bytes: int = 0
    """The largest size of a request's media, decoded."""
    output_tokens: int = 0
    """The longest answer that a request gets if it names no length, 0 if that is the engine's affair."""


def examine(
    wanted: Wanted, *, takes_key: bool, models: Collection[str], profile: EngineProfile | None
) -> dict[Check, bool]:
    """Return the outcome of each check that can be made of an engine, True where all is well.

    An engine that tells nothing about itself fails `plugin`, and the checks of what it would tell are left out.
    """
    if not takes_key:
        return {"key": False}
    serves = bool(models) if wanted.models is None else not wanted.models.isdisjoint(models)
    outcomes: dict[Check, bool] = {"key": True, "models": serves, "plugin": profile is not None}
    if profile is None:
        return outcomes
    told: dict[Check, bool | None] = {
        "frames": profile.speaks_frames,
        "reduction": profile.reduction.active,
        "presets": _allows(wanted, models, profile),
        "request_kwargs": profile.request_kwargs_trusted,
        "prompt_details": profile.prompt_tokens_details,
        "limits": _fits(wanted, profile),
    }
    return outcomes | {check: outcome for check, outcome in told.items() if outcome is not None}


def _allows(wanted: Wanted, models: Collection[str], profile: EngineProfile) -> bool:
    asked = {preset for model, preset in wanted.presets if model in models}
    return not profile.reduction.active or asked.issubset(profile.reduction.presets)


def _fits(wanted: Wanted, profile: EngineProfile) -> bool:
    decoded, context = profile.limits.media_decode_bytes, profile.context_length
    return (decoded is None or decoded >= wanted.decoded_bytes) and (context is None or context > wanted.output_tokens)
