"""AOT: video token reduction by token anchors and local-global optimal transport, and its place in vLLM.

The names below are loaded when first asked for: importing `aot_vllm` starts no torch, vllm or triton.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aot_vllm.config import AOTConfig
    from aot_vllm.core.budget import Budget, budget
    from aot_vllm.core.grid import VideoGrid
    from aot_vllm.core.reduce import ReducedVideo, reduce_video

_HOMES = {
    "AOTConfig": "aot_vllm.config",
    "Budget": "aot_vllm.core.budget",
    "ReducedVideo": "aot_vllm.core.reduce",
    "VideoGrid": "aot_vllm.core.grid",
    "budget": "aot_vllm.core.budget",
    "reduce_video": "aot_vllm.core.reduce",
}

__all__ = ["AOTConfig", "Budget", "ReducedVideo", "VideoGrid", "budget", "reduce_video"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
