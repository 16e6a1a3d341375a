"""Every use of a vLLM symbol that is not a documented plugin interface. Each is one named, idempotent function.

Each docstring says what breaks without the function, which versions need it, and when it can be deleted. A missing
symbol raises `UnsupportedError`: an engine that was asked to reduce videos must not start without the reduction.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from aot_vllm.adapters.registry import TESTED_VLLM_RELEASES
from aot_vllm.errors import UnsupportedError
from aot_vllm.frames import MAGIC, HandedOverVideo, is_frames_file, map_frames, read_frames

if TYPE_CHECKING:
    from pathlib import Path

    from vllm.config import ModelConfig, VllmConfig

_MARK = "_aot_wrapped"
INSTALL = "install vllm " + " or ".join(f"{release}.*" for release in TESTED_VLLM_RELEASES)
STATISTICS_METHOD = "aot_reduction_statistics"
"""Name of a method of the worker extension, and of the engine core's method that asks all workers for it."""


def vllm_version() -> str:
    """Return the version of the installed vLLM, without its local part (`0.32.0+cpu` -> `0.32.0`)."""
    import vllm

    return str(vllm.__version__).partition("+")[0]


def after_engine_config(activate: Callable[[VllmConfig, float | None], None]) -> None:
    """Call `activate(vllm_config, video_pruning_rate)` on each engine configuration, before an engine starts from it.

    Without this function, a model that does not support pruning would silently ignore `--video-pruning-rate`. vLLM
    checks the pruning method only for models that list some (`config/model.py`, after `MultiModalConfig(...)`), and
    plugins have no hook between the arguments and the engine. Needed up to 0.33. Delete it once plugins have one.

    Raises:
        UnsupportedError: vLLM has no `EngineArgs.create_engine_config`.
    """
    from vllm.engine.arg_utils import EngineArgs

    original = getattr(EngineArgs, "create_engine_config", None)
    if original is None:
        raise UnsupportedError(
            f"vLLM {vllm_version()} has no EngineArgs.create_engine_config, which aot-vllm needs; "
            f"{INSTALL}, or uninstall aot-vllm to serve without it"
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


def load_frames_files() -> None:
    """Make vLLM read a video whose first bytes are those of a frames file with `aot_vllm.frames`, and no other video.

    Without this function, a frames file would go to the decoder that vLLM chose for the model's processor, and that
    refuses it. vLLM has a registry of loaders, but one loader serves all videos of a server, and
    `VideoMediaIO.load_file` reads a whole file before any loader sees it. What vLLM keeps as a video's original bytes
    serves only its hash. For a frames file these are 40 bytes, which stand for its content and metadata. Needed up to
    0.33. Delete it once a loader can be chosen by content and receives the path of a file.

    Raises:
        UnsupportedError: vLLM has no `VideoMediaIO.load_bytes` or `VideoMediaIO.load_file`.
    """
    from vllm.multimodal.media import MediaWithBytes
    from vllm.multimodal.media import video as media
    from vllm.multimodal.video_decoders import check_frame_pixel_limit

    video_io: Any = getattr(media, "VideoMediaIO", None)
    load_bytes, load_file = (getattr(video_io, name, None) for name in ("load_bytes", "load_file"))
    if load_bytes is None or load_file is None:
        raise UnsupportedError(
            f"vLLM {vllm_version()} has no VideoMediaIO.load_bytes and load_file, through which aot-vllm reads the "
            f"frames that a gateway hands over; {INSTALL}, or uninstall aot-vllm to serve without it"
        )
    if getattr(load_file, _MARK, False):
        return

    def media_of(video: HandedOverVideo) -> Any:
        height, width = video.frames.shape[1:3]
        check_frame_pixel_limit(width, height)
        return MediaWithBytes((video.frames, video.metadata), video.identity)

    @functools.wraps(load_bytes)
    def load_frames_bytes(self: Any, data: bytes) -> Any:
        return media_of(read_frames(data)) if is_frames_file(data) else load_bytes(self, data)

    @functools.wraps(load_file)
    def load_frames_file(self: Any, filepath: Path) -> Any:
        with filepath.open("rb") as file:
            handed_over = is_frames_file(file.read(len(MAGIC)))
        return media_of(map_frames(filepath)) if handed_over else load_file(self, filepath)

    setattr(load_frames_file, _MARK, True)
    video_io.load_bytes, video_io.load_file = load_frames_bytes, load_frames_file


def refuse_missing_frames(missing: Callable[..., str | None]) -> None:
    """Make vLLM refuse a video of which fewer frames were read than should have been.

    Without this function, vLLM logs a warning, or nothing at all, and answers about the frames that it has. `missing`
    returns what is wrong, see `aot_vllm.adapters.decoded.missing_frames`. Needed up to 0.33. Delete it once it refuses
    such videos.

    Raises:
        UnsupportedError: vLLM has no `vllm.multimodal.video.decode_video`.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.multimodal import video

    original = getattr(video, "decode_video", None)
    if original is None:
        raise UnsupportedError(
            f"vLLM {vllm_version()} has no vllm.multimodal.video.decode_video, behind which aot-vllm counts the frames "
            f"that were read; {INSTALL}, or uninstall aot-vllm to serve without it"
        )
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def decode_video(backend: str, loader: Any, data: bytes, *args: Any, **kwargs: Any) -> Any:
        try:
            decoded = original(backend, loader, data, *args, **kwargs)
        except (ArithmeticError, RuntimeError, ValueError) as exc:  # of sampling from a length that makes no sense
            raise VLLMValidationError(f"the video could not be read: {exc}", parameter="video_url") from exc
        _, source, sampled, read = decoded
        wrong = missing(data, announced=source.total_frames_num, sampled=sampled, num_read=len(read))
        if wrong is not None:
            raise VLLMValidationError(wrong, parameter="video_url")
        return decoded

    setattr(decode_video, _MARK, True)
    vars(video)["decode_video"] = decode_video


def stock_pruning_methods(model_config: ModelConfig) -> tuple[str, ...]:
    """Return the names of vLLM's own pruning methods for a model, empty if vLLM would ignore the rate.

    Without this function, AOT could not tell a model with stock pruning from a model that silently ignores the rate.
    Needed up to 0.33, which holds the names in the private `ModelConfig._model_info`. Delete it once there is a public
    property.

    Raises:
        UnsupportedError: vLLM has no `ModelConfig._model_info.supported_video_pruning_methods`.
    """
    try:
        return tuple(model_config._model_info.supported_video_pruning_methods)
    except AttributeError as exc:
        raise UnsupportedError(
            f"vLLM {vllm_version()} does not say which video pruning methods a model supports "
            f"(ModelConfig._model_info.supported_video_pruning_methods); {INSTALL}"
        ) from exc


def observe_rendered_chats(state: Any, observe: Callable[[Sequence[Any]], None]) -> None:
    """Call `observe(engine_inputs)` each time the server has rendered a chat or a response into engine inputs.

    Without this function, the savings of a request would be unknown. They are recorded by item hash, and only
    `OnlineRenderer.render_chat` and `render_responses` know the hashes of a request. Needed up to 0.33. Delete it once
    endpoint plugins receive the rendered prompt.

    Raises:
        UnsupportedError: vLLM has no `state.online_renderer.render_chat`.
    """
    renderer = getattr(state, "online_renderer", None)
    if renderer is None or getattr(renderer, "render_chat", None) is None:
        raise UnsupportedError(
            f"vLLM {vllm_version()} has no state.online_renderer.render_chat, from which aot-vllm reads the savings "
            f"of a request; {INSTALL}, or drop aot from VLLM_PLUGINS to serve without it"
        )
    _observe(renderer, "render_chat", lambda rendered: rendered[1] if isinstance(rendered, tuple) else (), observe)
    if getattr(renderer, "render_responses", None) is not None:
        _observe(renderer, "render_responses", _input_of_response, observe)


def _input_of_response(rendered: Any) -> Sequence[Any]:
    found = getattr(rendered, "engine_input", None)  # an ErrorResponse has none
    return () if found is None else (found,)


def _observe(
    renderer: Any, name: str, inputs_in: Callable[[Any], Sequence[Any]], observe: Callable[[Sequence[Any]], None]
) -> None:
    """Call `observe` with the inputs in what the renderer's method returns. Does nothing the second time."""
    original: Callable[..., Awaitable[Any]] = getattr(renderer, name)
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    async def render(*args: Any, **kwargs: Any) -> Any:
        rendered = await original(*args, **kwargs)
        if inputs := inputs_in(rendered):
            observe(inputs)
        return rendered

    setattr(render, _MARK, True)
    setattr(renderer, name, render)


def is_first_api_server(vllm_config: VllmConfig) -> bool:
    """Return whether this process is the only API server of its engine, or the first of several.

    Without this function, each of several API servers (`--api-server-count`) would count the same reductions of the
    workers, and the sum over servers would be too high. Needed up to 0.33, which holds the rank in the private
    `ParallelConfig._api_process_rank`. Delete it once the rank is public.

    Raises:
        UnsupportedError: vLLM has no `ParallelConfig._api_process_rank`.
    """
    try:
        return int(vllm_config.parallel_config._api_process_rank) <= 0
    except AttributeError as exc:
        raise UnsupportedError(
            f"vLLM {vllm_version()} does not say which API server this is (ParallelConfig._api_process_rank); "
            f"{INSTALL}, or drop aot from VLLM_PLUGINS to serve without it"
        ) from exc


def let_engine_report_statistics() -> None:
    """Give the engine core a method `aot_reduction_statistics`, which returns what each of its workers reports.

    Without this function, each scrape would hold up the engine. `EngineCore.collective_rpc` waits for an answer, and
    `MultiprocExecutor` gives answers in order, so the engine would wait for every step in flight before it schedules
    the next one. While steps are in flight, this method returns a future, which `EngineCoreProc` passes on to the API
    server when it is done. Needed up to 0.33. Delete it once `collective_rpc` of the core doesn't wait.

    Raises:
        UnsupportedError: vLLM has no `EngineCore.collective_rpc`.
    """
    module = sys.modules.get("vllm.v1.engine.core")
    if module is None:  # in a process without an engine core
        return
    engine_core = getattr(module, "EngineCore", None)
    if getattr(engine_core, "collective_rpc", None) is None:
        raise UnsupportedError(
            f"vLLM {vllm_version()} has no EngineCore.collective_rpc, through which aot-vllm asks workers for "
            f"statistics; {INSTALL}, or uninstall aot-vllm to serve without it"
        )

    def aot_reduction_statistics(self: Any) -> Any:
        executor = self.model_executor
        # other executors answer at once (one worker), or never tell when a future is done (Ray)
        steps_in_flight = bool(getattr(self, "batch_queue", None)) and hasattr(executor, "futures_queue")
        arguments = {"non_block": True} if steps_in_flight else {}
        return executor.collective_rpc(STATISTICS_METHOD, **arguments)

    setattr(engine_core, STATISTICS_METHOD, aot_reduction_statistics)


async def statistics_of_engines(engine_client: Any) -> list[Any]:
    """Return what the first worker of each data-parallel engine reports. All workers of an engine count the same.

    Without this function, only the first engine would be asked: `collective_rpc` of the client returns the answer of
    one. Needed up to 0.33. Delete it once the client returns all answers.

    Raises:
        UnsupportedError: vLLM has no `AsyncLLM.engine_core.call_utility_all_async`.
    """
    call = getattr(getattr(engine_client, "engine_core", None), "call_utility_all_async", None)
    if call is None:
        raise UnsupportedError(
            f"vLLM {vllm_version()} has no AsyncLLM.engine_core.call_utility_all_async, through which aot-vllm asks "
            f"engines for statistics; {INSTALL}"
        )
    return [workers[0] for workers in await call(STATISTICS_METHOD)]


def let_cpu_runner_recompute_positions() -> None:
    """Make Model Runner V1 on a CPU call its hook for pruning models, as it does on a GPU.

    Without this function, nothing removes the coordinates behind a video's embeddings, and the first video ends the
    engine. `GPUModelRunner.load_model` sets `is_multimodal_pruning_enabled`; `CPUModelRunner.load_model` does not.
    Needed up to 0.33. Delete it once the CPU runner sets the flag. Only reduced models call it, so no other model is
    affected.

    Raises:
        UnsupportedError: vLLM has no `CPUModelRunner`.
    """
    runner = sys.modules.get("vllm.v1.worker.cpu_model_runner")
    if runner is None:  # on a GPU, or with Model Runner V2, which does not need the flag
        return
    try:
        cpu_runner = runner.CPUModelRunner
    except AttributeError as exc:
        raise UnsupportedError(
            f"vLLM {vllm_version()} has no CPUModelRunner, whose hook for pruning models aot-vllm needs; {INSTALL}"
        ) from exc
    flag = "is_multimodal_pruning_enabled"
    if not isinstance(vars(cpu_runner).get(flag), property):
        # ignores writes: the runner sets its own value to False before it loads the model
        model_has_it = property(lambda self: getattr(getattr(self, "model", None), flag, False), lambda *_: None)
        setattr(cpu_runner, flag, model_has_it)


def let_proposer_know_reduced_models() -> None:
    """Make speculative decoding in Model Runner V1 treat a reduced model as the in-tree model it derives from.

    Without this function, an engine with speculative decoding fails at start. `SpecDecodeBaseProposer.load_model` looks
    up the field of the configuration that holds the image token, by the name of the target model's class. Needed up to
    0.33. Delete it once the proposer asks the model. Model Runner V2 does not need it.

    Raises:
        UnsupportedError: vLLM has no `SpecDecodeBaseProposer.get_model_name`.
    """
    module = sys.modules.get("vllm.v1.spec_decode.llm_base_proposer")
    if module is None:
        return
    original = getattr(getattr(module, "SpecDecodeBaseProposer", None), "get_model_name", None)
    if original is None:
        raise UnsupportedError(
            f"vLLM {vllm_version()} has no SpecDecodeBaseProposer.get_model_name, which aot-vllm needs for "
            f"speculative decoding with a reduced model; {INSTALL}"
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


def let_rope_state_keep_known_deltas() -> None:
    """Let a model tell Model Runner V2 that the delta of a prompt's positions stays what it is, by a delta of None.

    Without this function, a step with videos would wait for the vision tower and the reduction, to read back a number
    that is known since the prompt arrived. `MultiModalPruner` passes the delta from `recompute_mrope_positions` on to
    `RopeState.update_prefill_positions`, which stores it in host memory. Needed up to 0.33. Delete it once the hook may
    leave the delta out. Model Runner V1 does not use `RopeState`.

    Raises:
        UnsupportedError: vLLM has no `RopeState.update_prefill_positions`.
    """
    module = sys.modules.get("vllm.v1.worker.gpu.mm.rope")
    if module is None:
        return
    original = getattr(getattr(module, "RopeState", None), "update_prefill_positions", None)
    if original is None:
        raise UnsupportedError(
            f"vLLM {vllm_version()} has no RopeState.update_prefill_positions, to which aot-vllm passes the positions "
            f"of reduced videos; {INSTALL}"
        )
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def update_prefill_positions(self: Any, req_idx: int, positions: Any, delta: int | None) -> None:
        original(self, req_idx, positions, int(self.prefill_delta.np[req_idx]) if delta is None else delta)

    setattr(update_prefill_positions, _MARK, True)
    module.RopeState.update_prefill_positions = update_prefill_positions
