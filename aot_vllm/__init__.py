"""AOT for vLLM: video token reduction by token anchors and local-global optimal transport.

The public names are loaded on first use. Importing `aot_vllm` does not load torch, vllm or triton.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str

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
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def _version() -> str:
    """Return the version of the installed distribution, which pyproject.toml states."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("aot-vllm")
    except PackageNotFoundError as exc:
        raise AttributeError("aot_vllm has no __version__, because the distribution aot-vllm is not installed") from exc


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
