"""The settings under `--additional-config '{"aot": {...}}'`, and how they travel to every vLLM process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from aot_vllm.config import AOTConfig, check_retention
from aot_vllm.errors import SettingError
from aot_vllm.kernels.dispatch import Kernels, check_kernels

PPM = 1_000_000
"""A retention travels as whole millionths: an integer survives every cast between the processor and the worker."""

_CARRIER = "aot_video_reduction"


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise SettingError(f"{name} must be true or false, got {value!r}")
    return value


@dataclass(frozen=True, kw_only=True)
class PluginSettings:
    """The `"aot"` part of `--additional-config`: the settings of the plugin and those of the method."""

    enabled: bool = True
    """False leaves the rate to vLLM's own pruning. A model without pruning of its own then does not start."""
    allow_untested_vllm: bool = False
    """True starts on a vLLM release that the adapters were not tested with."""
    kernels: Kernels = "auto"
    """Who computes the expensive parts of the reduction: `triton`, `torch`, or `auto` for Triton on NVIDIA GPUs. The
    result is the same up to rounding, so this setting is not part of the method and of no cache key of a video."""
    method: AOTConfig = field(default_factory=AOTConfig)

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
        own = {f.name for f in fields(cls)} - {"method"}
        switches: dict[str, Any] = {
            name: check_kernels(value) if name == "kernels" else _flag(name, value)
            for name, value in given.items()
            if name in own
        }
        rest = {name: value for name, value in given.items() if name not in own}
        allowed = own | {f.name for f in fields(AOTConfig)}
        if unknown := sorted(str(name) for name in rest if name not in allowed):
            raise SettingError(f"unknown aot settings {unknown}; allowed are {sorted(allowed)}")
        return cls(**switches, method=AOTConfig.from_mapping(rest))


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """The server-wide retention, in (0, 1], the settings of the method, and who computes it."""

    retention: float
    method: AOTConfig
    kernels: Kernels = "auto"

    def attach(self, multimodal_config: Any) -> None:
        """Write this reduction into the model's multimodal configuration, which vLLM passes to every process.

        vLLM's hash of compiled code covers the model's own configuration, but not this attribute. A reduction changes
        nothing that is compiled, so engines with different retentions and settings share what they compile.
        """
        carried = {"retention": self.retention, "method": self.method.settings(), "kernels": self.kernels}
        setattr(multimodal_config, _CARRIER, carried)

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
            method=AOTConfig.from_mapping(carried["method"]),
            kernels=check_kernels(carried["kernels"]),
        )


def to_ppm(retention: float) -> int:
    """Return a retention in (0, 1] as whole millionths, at least one; raises `SettingError` outside that range."""
    return max(1, round(check_retention(retention) * PPM))


def from_ppm(millionths: int) -> float:
    """Return the retention that `to_ppm` encoded; raises `SettingError` if it is outside (0, 1]."""
    return check_retention(millionths / PPM)
