"""Every touch of a vLLM symbol that isn't a documented plugin interface: one named, idempotent function each.

Each docstring says what breaks without it, in which versions it holds, and when it can go. A symbol that is missing
raises `UnsupportedError`: an engine that was asked to reduce must not start unreduced.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from aot_vllm.errors import UnsupportedError

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

_MARK = "_aot_wrapped"


def vllm_version() -> str:
    """Return the version of the installed vLLM, without its local part (`0.32.0+cpu` -> `0.32.0`)."""
    import vllm

    return str(vllm.__version__).partition("+")[0]


def after_engine_config(activate: Callable[[VllmConfig, float | None], None]) -> None:
    """Call `activate(vllm_config, video_pruning_rate)` on each engine configuration before anything is started from it.

    Without it a model that knows no pruning ignores `--video-pruning-rate` in silence: vLLM 0.32 checks the method only
    on models that list some (`config/model.py`, the check after `MultiModalConfig(...)`), and a plugin gets no say
    between the arguments and the engine. Holds for 0.32; can go when an engine-config hook exists for plugins.
    """
    from vllm.engine.arg_utils import EngineArgs

    original = getattr(EngineArgs, "create_engine_config", None)
    if original is None:
        raise UnsupportedError(
            f"vLLM {vllm_version()} has no EngineArgs.create_engine_config, on which aot-vllm builds; "
            "install vllm 0.32.*, or uninstall aot-vllm to serve without it"
        )
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> VllmConfig:
        vllm_config = original(self, *args, **kwargs)
        activate(vllm_config, self.video_pruning_rate)
        return vllm_config

    setattr(create_engine_config, _MARK, True)
    EngineArgs.create_engine_config = create_engine_config


def stock_pruning_methods(model_config: ModelConfig) -> tuple[str, ...]:
    """Return the pruning methods vLLM itself has for a model, empty if it would ignore the rate.

    Without it AOT couldn't tell a model that stock pruning serves from one that drops the rate in silence. The answer
    sits in the private `ModelConfig._model_info`, 0.32; can go when `ModelConfig` has a public property for it.
    """
    try:
        return tuple(model_config._model_info.supported_video_pruning_methods)
    except AttributeError as exc:
        raise UnsupportedError(
            f"vLLM {vllm_version()} does not say which video pruning methods a model supports "
            "(ModelConfig._model_info.supported_video_pruning_methods); install vllm 0.32.*"
        ) from exc


def observe_rendered_chats(state: Any, observe: Callable[[Sequence[Any]], None]) -> None:
    """Call `observe(engine_inputs)` whenever the server has turned a chat request into engine inputs.

    Without it the number of video tokens before the reduction, which vLLM knows nowhere, can't be told for a request:
    item hashes and placeholders of a chat are only seen together in `OnlineRenderer.render_chat`. 0.32; can go when
    endpoint plugins are handed the rendered prompt.
    """
    renderer = getattr(state, "online_renderer", None)
    original: Callable[..., Awaitable[Any]] | None = getattr(renderer, "render_chat", None)
    if renderer is None or original is None:
        raise UnsupportedError(
            f"vLLM {vllm_version()} has no state.online_renderer.render_chat, from which aot-vllm reads what a request "
            "saved; install vllm 0.32.*, or drop aot from VLLM_PLUGINS to serve without it"
        )
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    async def render_chat(*args: Any, **kwargs: Any) -> Any:
        rendered = await original(*args, **kwargs)
        if isinstance(rendered, tuple):  # otherwise an ErrorResponse
            observe(rendered[1])
        return rendered

    setattr(render_chat, _MARK, True)
    renderer.render_chat = render_chat


def is_first_api_server(vllm_config: VllmConfig) -> bool:
    """Return whether this process is the only API server of its engine, or the first of several.

    Without it each of several API servers (`--api-server-count`) would count what the workers did, and metrics are
    summed. The rank sits in the private `ParallelConfig._api_process_rank`, 0.32; can go when it is public.
    """
    return int(getattr(vllm_config.parallel_config, "_api_process_rank", 0)) <= 0


def let_cpu_runner_recompute_positions() -> None:
    """Make Model Runner V1 on a CPU run its hook for pruning models, as it does on a GPU.

    Without it the coordinates behind a video's embeddings stay there, and the first video ends the engine:
    `CPUModelRunner.load_model` doesn't set `is_multimodal_pruning_enabled`, which `GPUModelRunner.load_model` does.
    0.32; can go when it is set there. Called by models that are reduced, so nothing changes where none is.
    """
    runner = sys.modules.get("vllm.v1.worker.cpu_model_runner")
    if runner is None:  # a GPU, or Model Runner V2, which has no such flag
        return
    try:
        cpu_runner = runner.CPUModelRunner
    except AttributeError as exc:
        raise UnsupportedError(
            f"vLLM {vllm_version()} has no CPUModelRunner, whose hook for pruning models aot-vllm needs; "
            "install vllm 0.32.*"
        ) from exc
    flag = "is_multimodal_pruning_enabled"
    if not isinstance(vars(cpu_runner).get(flag), property):
        # the runner's own value, set to False before the model is there, is of no interest
        model_has_it = property(lambda self: getattr(getattr(self, "model", None), flag, False), lambda *_: None)
        setattr(cpu_runner, flag, model_has_it)


def let_proposer_know_reduced_models() -> None:
    """Make Model Runner V1 take a reduced model for the in-tree one it is made of, where another model drafts for it.

    Without it an engine with speculative decoding ends at start: `SpecDecodeBaseProposer.load_model` finds out which
    field of the configuration holds the image token by the name of the model's class. 0.32; can go when it asks the
    model. Model Runner V2 doesn't ask at all.
    """
    module = sys.modules.get("vllm.v1.spec_decode.llm_base_proposer")
    if module is None:
        return
    original = getattr(getattr(module, "SpecDecodeBaseProposer", None), "get_model_name", None)
    if original is None:
        raise UnsupportedError(
            f"vLLM {vllm_version()} has no SpecDecodeBaseProposer.get_model_name, by which it tells models apart that "
            "others draft for; install vllm 0.32.*"
        )
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def get_model_name(self: Any, model: Any) -> str:
        classes = type(getattr(model, "module", model)).__mro__
        if not classes[0].__module__.startswith("aot_vllm."):
            return str(original(self, model))
        return next(cls.__name__ for cls in classes if cls.__module__.startswith("vllm."))

    setattr(get_model_name, _MARK, True)
    module.SpecDecodeBaseProposer.get_model_name = get_model_name
