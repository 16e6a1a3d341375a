"""The decision at start: whether `--video-pruning-rate` activates AOT, vLLM's own pruning, or nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vllm import envs
from vllm.logger import init_logger

from aot_vllm.adapters import compat
from aot_vllm.adapters.decoded import missing_frames
from aot_vllm.adapters.guards import refuse_unsupported_modes, takes_videos
from aot_vllm.adapters.registry import ARCHITECTURES, TESTED_VLLM_RELEASES, reduced_architecture
from aot_vllm.adapters.settings import PPM, PluginSettings, Reduction
from aot_vllm.errors import UnsupportedError

if TYPE_CHECKING:
    from vllm.config import ParallelConfig, VllmConfig

logger = init_logger("vllm.aot")

WORKER_EXTENSION = "aot_vllm.adapters.telemetry.WorkerExtension"


def activate(vllm_config: VllmConfig, video_pruning_rate: float | None) -> None:
    """Activate AOT in a new engine configuration that has a pruning rate. Without a rate, change nothing.

    `video_pruning_rate`: the fraction of video tokens to drop, in [0, 1). None and 0 mean off.

    Raises:
        SettingError: a setting under `"aot"` is unknown or out of range.
        UnsupportedError: the rate or the `"aot"` settings would be ignored, this vLLM was not tested, or AOT does not
            work in a mode that the configuration asks for.
    """
    settings = PluginSettings.from_additional_config(vllm_config.additional_config)
    additional = vllm_config.additional_config
    given = isinstance(additional, Mapping) and additional.get("aot") is not None
    if not video_pruning_rate:
        if given:
            logger.warning("AOT is off: aot settings are given, but --video-pruning-rate is not set or 0.")
        return

    model_config = vllm_config.model_config
    architectures = list(model_config.hf_config.architectures or [])
    supported = [name for name in architectures if name in ARCHITECTURES]
    if not settings.enabled or not supported:
        _leave_to_stock(vllm_config, video_pruning_rate, architectures, settings=settings, given=given)
        return

    _require_tested_version(settings)
    retention = round((1 - video_pruning_rate) * PPM) / PPM
    hf_config = model_config.hf_config
    reduction = Reduction.chosen(settings, retention=retention, architecture=supported[0], hf_config=hf_config)
    refuse_unsupported_modes(vllm_config, reduction.methods)
    reduction.attach(model_config.multimodal_config)
    _take_settings(vllm_config)
    hf_config.architectures = [reduced_architecture(supported[0])]
    _extend_workers(vllm_config.parallel_config)
    compat.refuse_missing_frames(missing_frames)
    logger.info(
        "AOT is active on %s: retention %g, preset %s, settings %s.",
        supported[0],
        reduction.retention,
        reduction.description,
        json.dumps(reduction.method.in_effect()),
    )
    if not takes_videos(vllm_config):
        logger.warning("AOT: this engine takes no videos, so there is nothing to reduce; its limit for them is 0.")
    _warn_without_endpoint()


def _take_settings(vllm_config: VllmConfig) -> None:
    """Remove the settings that travel with the reduction from what vLLM's hash of compiled code covers."""
    additional = vllm_config.additional_config
    if not isinstance(additional, dict):
        return
    others = {name: value for name, value in additional.items() if name != "aot"}
    kept = {name: value for name, value in (additional.get("aot") or {}).items() if name == "measure_prefill"}
    vllm_config.additional_config = {**others, "aot": kept} if kept else others


def _extend_workers(parallel_config: ParallelConfig) -> None:
    """Give the workers AOT's extension, or warn if they have another extension already."""
    if parallel_config.worker_extension_cls:
        logger.warning(
            "AOT: --worker-extension-cls is taken by %s, so aot_engine_reductions, aot_engine_reduction_seconds, "
            "aot_engine_tower_seconds and aot_engine_unconverged_solves stay at 0.",
            parallel_config.worker_extension_cls,
        )
    else:
        parallel_config.worker_extension_cls = WORKER_EXTENSION


def _warn_without_endpoint() -> None:
    """Warn if this server will not load AOT's endpoint plugin."""
    if "aot" not in (envs.VLLM_PLUGINS or ()):
        logger.warning(
            "AOT: VLLM_PLUGINS does not name aot, so responses carry no x-aot-* headers and /metrics no aot_engine_*; "
            "set VLLM_PLUGINS=aot."
        )


def _leave_to_stock(
    vllm_config: VllmConfig, rate: float, architectures: list[str], *, settings: PluginSettings, given: bool
) -> None:
    """Leave the rate to vLLM's own pruning with a warning; raise if it or the `"aot"` settings would be ignored."""
    name = ", ".join(architectures) or vllm_config.model_config.model
    methods = compat.stock_pruning_methods(vllm_config.model_config)
    if not methods:
        raise UnsupportedError(
            f"--video-pruning-rate {rate} would be ignored: {name} has no video pruning in vLLM"
            + ("" if settings.enabled else ' and {"aot": {"enabled": false}} switches AOT off')
            + f". Drop the rate, or serve one of {sorted(ARCHITECTURES)} with AOT enabled."
        )
    if given and settings.enabled:
        raise UnsupportedError(
            f"aot settings were given, but AOT does not support {name}; it would be pruned by vLLM's own "
            f"{' or '.join(methods)}. Drop the aot settings, or serve one of {sorted(ARCHITECTURES)}."
        )
    reason = "it is switched off" if not settings.enabled else f"it does not support {name}"
    logger.warning("This is not AOT: %s, so vLLM's own video pruning takes the rate %g.", reason, rate)


def _require_tested_version(settings: PluginSettings) -> None:
    """Raise `UnsupportedError` on a vLLM release that was not tested, unless the settings allow it."""
    version = compat.vllm_version()
    if ".".join(version.split(".")[:2]) in TESTED_VLLM_RELEASES:
        return
    tested = ", ".join(f"{release}.*" for release in TESTED_VLLM_RELEASES)
    if not settings.allow_untested_vllm:
        raise UnsupportedError(
            f"AOT was tested with vLLM {tested}, this is {version}. Install a tested release, or start anyway with "
            '--additional-config \'{"aot": {"allow_untested_vllm": true}}\'.'
        )
    logger.warning(
        "AOT was tested with vLLM %s, this is %s; starting because allow_untested_vllm is set.", tested, version
    )
