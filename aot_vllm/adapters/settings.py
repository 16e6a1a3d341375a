"""The settings under `--additional-config '{"aot": {...}}'`, and how they travel to every vLLM process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, partial
from typing import Any

from aot_vllm.config import AOTConfig, check_retention
from aot_vllm.errors import SettingError
from aot_vllm.kernels.dispatch import Kernels, check_kernels
from aot_vllm.presets import DEFAULTS, PRESETS, STANDARD

PPM = 1_000_000
"""A retention travels as whole millionths: an integer survives every cast between the processor and the worker."""

_CARRIER = "aot_video_reduction"

CHECKPOINT_KEY = "aot"
"""The key under which a checkpoint's `config.json` names a preset, with single settings if it wants."""


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise SettingError(f"{name} must be true or false, got {value!r}")
    return value


def _names_of_presets(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or any(not isinstance(name, str) or name not in PRESETS for name in value):
        raise SettingError(f"allowed_presets must be a list of presets, {', '.join(PRESETS)}, got {value!r}")
    return tuple(value)


@dataclass(frozen=True, kw_only=True)
class PluginSettings:
    """The `"aot"` part of `--additional-config`: the settings of the plugin and those of the method."""

    enabled: bool = True
    """False leaves the rate to vLLM's own pruning. A model without pruning of its own then does not start."""
    allow_untested_vllm: bool = False
    """True starts on a vLLM release that the adapters were not tested with."""
    measure_prefill: bool = True
    """False starts without measuring what prefill costs. Gateways then report no time that reductions save."""
    kernels: Kernels = "auto"
    """Who computes the expensive parts of the reduction: `triton`, `torch`, or `auto` for Triton on NVIDIA GPUs. The
    result is the same up to rounding, so this setting is not part of the method and of no cache key of a video."""
    allowed_presets: tuple[str, ...] = ()
    """Presets that a request may name. A request that names none gets the engine's own settings."""
    method: Mapping[str, Any] = field(default_factory=dict)
    """What the operator says of the method: a preset, single settings, both, or nothing."""

    @classmethod
    def from_additional_config(cls, additional_config: object) -> PluginSettings:
        """Return the settings in `additional_config["aot"]`, with defaults for all others.

        Raises:
            SettingError: `"aot"` is not a mapping, a name in it is unknown, or a value is out of range.
        """
        given = additional_config.get("aot") if isinstance(additional_config, Mapping) else None
        if given is None:
            return cls()
        if not isinstance(given, Mapping):
            raise SettingError(f"additional_config['aot'] must be a JSON object, got {given!r}")
        checks: dict[str, Callable[[Any], Any]] = {
            "enabled": partial(_flag, "enabled"),
            "allow_untested_vllm": partial(_flag, "allow_untested_vllm"),
            "measure_prefill": partial(_flag, "measure_prefill"),
            "kernels": check_kernels,
            "allowed_presets": _names_of_presets,
        }
        switches: dict[str, Any] = {name: checks[name](value) for name, value in given.items() if name in checks}
        method = {name: value for name, value in given.items() if name not in checks}
        of_method = {f.name for f in fields(AOTConfig)}
        if unknown := sorted(str(name) for name in method if name not in of_method | {"preset"}):
            allowed = sorted({*checks, "preset", *of_method})
            raise SettingError(f"unknown aot settings {unknown}; allowed are {allowed}")
        AOTConfig.preset(method.get("preset", STANDARD))
        AOTConfig(**{name: value for name, value in method.items() if name != "preset"})
        return cls(**switches, method=method)


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """The server-wide retention, in (0, 1], the settings of the method, and the presets that a request may name."""

    retention: float
    method: AOTConfig
    preset: str = STANDARD
    """The preset that `method` is, up to `changes`."""
    allowed_presets: tuple[str, ...] = ()
    kernels: Kernels = "auto"
    """Who computes the expensive parts."""

    @classmethod
    def chosen(cls, settings: PluginSettings, *, retention: float, architecture: str, hf_config: Any) -> Reduction:
        """Return what an engine runs: the operator's preset, else the checkpoint's, else the architecture's.

        Single settings of the checkpoint belong to its preset. Those of the operator change whichever preset it is.

        Raises:
            SettingError: a setting takes no effect, or the checkpoint names something unknown.
        """
        if "preset" in settings.method:
            preset, method = settings.method["preset"], AOTConfig.from_mapping(settings.method)
        else:
            preset, method = _preset_of_checkpoint(hf_config, otherwise=DEFAULTS[architecture].preset)
            method = method.changed(settings.method, preset=preset)
        return cls(
            retention=retention,
            method=method,
            preset=preset,
            allowed_presets=settings.allowed_presets,
            kernels=settings.kernels,
        )

    def attach(self, multimodal_config: Any) -> None:
        """Write this reduction into the model's multimodal configuration, which vLLM passes to every process.

        vLLM's hash of compiled code covers the model's own configuration, but not this attribute. A reduction changes
        nothing that is compiled, so engines with different retentions and settings share what they compile.
        """
        setattr(multimodal_config, _CARRIER, asdict(self))

    @classmethod
    def of(cls, multimodal_config: Any) -> Reduction:
        """Return the reduction that `attach` wrote.

        Raises:
            SettingError: the engine was not activated for AOT.
        """
        carried = getattr(multimodal_config, _CARRIER, None)
        if carried is None:
            raise SettingError("this model configuration carries no AOT settings; start vLLM with --video-pruning-rate")
        return cls(
            retention=check_retention(carried["retention"]),
            method=AOTConfig(**carried["method"]),
            preset=carried["preset"],
            allowed_presets=tuple(carried["allowed_presets"]),
            kernels=check_kernels(carried["kernels"]),
        )

    @cached_property
    def methods(self) -> tuple[AOTConfig, ...]:
        """The settings that requests may get, by number: 0 are the engine's own, then the allowed presets in order."""
        return (self.method, *map(AOTConfig.preset, self.allowed_presets))

    def preset_number(self, asked: object) -> int:
        """Return the number in `methods` of the preset that a request asks for, 0 if it asks for none.

        Raises:
            SettingError: the engine doesn't allow this preset.
        """
        if asked is None or (asked == self.preset and not self.changes):
            return 0
        if isinstance(asked, str) and asked in self.allowed_presets:
            return 1 + self.allowed_presets.index(asked)
        raise SettingError(
            f"aot_preset must be one of the presets that this engine allows, {self._allowed}, got {asked!r}; "
            "its operator lists them under allowed_presets in the aot settings"
        )

    @property
    def presets(self) -> tuple[str, ...]:
        """The names that a request may give as its preset."""
        own = () if self.changes else (self.preset,)
        return tuple(dict.fromkeys((*own, *self.allowed_presets)))

    @property
    def _allowed(self) -> str:
        return ", ".join(self.presets) or f"none but its own, {self.description}, which a request gets without a name"

    @property
    def changes(self) -> dict[str, Any]:
        """The single settings that take effect, and in which `method` differs from its preset."""
        preset = AOTConfig.preset(self.preset)
        return {name: value for name, value in self.method.in_effect().items() if getattr(preset, name) != value}

    @property
    def description(self) -> str:
        """The preset in words, with what single settings change, as in `diverse with mass 0.2`."""
        changes = ", ".join(f"{name} {value}" for name, value in self.changes.items())
        return f"{self.preset} with {changes}" if changes else self.preset


def _preset_of_checkpoint(hf_config: Any, *, otherwise: str) -> tuple[str, AOTConfig]:
    """Return the preset that a checkpoint names, or `otherwise`, and its settings."""
    named = getattr(hf_config, CHECKPOINT_KEY, None)
    if named is None:
        return otherwise, AOTConfig.preset(otherwise)
    try:
        if not isinstance(named, Mapping):
            raise SettingError(f"must be a JSON object, got {named!r}")
        method = AOTConfig.from_mapping({"preset": otherwise, **named})
    except SettingError as exc:
        raise SettingError(f"{CHECKPOINT_KEY} in the checkpoint's config.json: {exc}") from exc
    return named.get("preset", otherwise), method


def to_ppm(retention: float) -> int:
    """Return a retention in (0, 1] as whole millionths, at least one; raises `SettingError` outside that range."""
    return max(1, round(check_retention(retention) * PPM))


def from_ppm(millionths: int) -> float:
    """Return the retention that `to_ppm` encoded; raises `SettingError` if it is outside (0, 1]."""
    return check_retention(millionths / PPM)
