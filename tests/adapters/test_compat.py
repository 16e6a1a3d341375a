"""Every use of a private vLLM symbol: it does its work once, and names the symbol if it is missing."""

import sys
from collections import deque
from types import ModuleType, SimpleNamespace

import pytest
from vllm.config import ParallelConfig
from vllm.engine.arg_utils import EngineArgs

from aot_vllm.adapters import compat
from aot_vllm.adapters.registry import ARCHITECTURES
from aot_vllm.errors import UnsupportedError


def test_the_version_of_vllm_comes_without_its_local_part(monkeypatch):
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.32.1+cpu")
    assert compat.vllm_version() == "0.32.1"


@pytest.fixture
def plain_engine_args(monkeypatch):
    """Let `EngineArgs` return its arguments as the configuration, as if no plugin were installed."""
    monkeypatch.setattr(EngineArgs, "create_engine_config", lambda self, *args, **kwargs: (args, kwargs))


@pytest.mark.usefixtures("plain_engine_args")
def test_each_engine_configuration_is_seen_once_with_its_rate_however_often_it_is_registered(tmp_path):
    seen = []
    for _ in range(3):
        compat.after_engine_config(lambda *arguments: seen.append(arguments))
    returned = EngineArgs(model=str(tmp_path), video_pruning_rate=0.25).create_engine_config("usage", headless=True)
    assert returned == (("usage",), {"headless": True})
    assert seen == [(returned, 0.25)]


@pytest.mark.usefixtures("plain_engine_args")
def test_an_engine_that_must_not_start_does_not_get_its_configuration(tmp_path):
    def refuse(vllm_config, rate):
        raise UnsupportedError("no")

    compat.after_engine_config(refuse)
    with pytest.raises(UnsupportedError, match=r"^no$"):
        EngineArgs(model=str(tmp_path)).create_engine_config()


def test_a_vllm_without_an_engine_configuration_is_refused_by_name(monkeypatch):
    monkeypatch.delattr(EngineArgs, "create_engine_config")
    with pytest.raises(UnsupportedError, match=r"has no EngineArgs\.create_engine_config, .*install vllm 0\.32\.\*"):
        compat.after_engine_config(lambda *_: None)


@pytest.mark.parametrize("methods", [(), ("evs",), ("evs", "vidcom2")])
def test_the_stock_pruning_methods_of_a_model_are_those_that_vllm_lists(methods):
    info = SimpleNamespace(supported_video_pruning_methods=list(methods))
    assert compat.stock_pruning_methods(SimpleNamespace(_model_info=info)) == methods


@pytest.mark.parametrize("model_config", [SimpleNamespace(), SimpleNamespace(_model_info=SimpleNamespace())])
def test_a_vllm_that_lists_no_pruning_methods_is_refused_by_name(model_config):
    with pytest.raises(UnsupportedError, match=r"ModelConfig\._model_info\.supported_video_pruning_methods.*0\.32"):
        compat.stock_pruning_methods(model_config)


def renderer_that_returns(result):
    async def render_chat(request, **kwargs):
        assert (request, kwargs) == ("chat", {"option": 1})
        return result

    return SimpleNamespace(online_renderer=SimpleNamespace(render_chat=render_chat))


async def test_the_engine_inputs_of_each_chat_are_observed_once_however_often_it_is_asked_for():
    observed = []
    state = renderer_that_returns(("conversation", ["input"]))
    for _ in range(3):
        compat.observe_rendered_chats(state, observed.append)
    assert await state.online_renderer.render_chat("chat", option=1) == ("conversation", ["input"])
    assert observed == [["input"]]


async def test_a_chat_that_could_not_be_rendered_is_not_observed():
    observed = []
    state = renderer_that_returns("an error response")
    compat.observe_rendered_chats(state, observed.append)
    assert await state.online_renderer.render_chat("chat", option=1) == "an error response"
    assert observed == []


async def test_the_engine_input_of_each_response_is_observed_too():
    observed, results = [], iter([SimpleNamespace(engine_input="input"), SimpleNamespace(error="no")])

    async def render_responses(request):
        return next(results)

    state = renderer_that_returns(None)
    state.online_renderer.render_responses = render_responses
    for _ in range(2):
        compat.observe_rendered_chats(state, observed.append)
    assert (await state.online_renderer.render_responses("response")).engine_input == "input"
    assert (await state.online_renderer.render_responses("response")).error == "no"
    assert observed == [("input",)]


@pytest.mark.parametrize("state", [SimpleNamespace(), SimpleNamespace(online_renderer=SimpleNamespace())])
def test_a_vllm_without_a_chat_renderer_is_refused_by_name(state):
    with pytest.raises(
        UnsupportedError, match=r"has no state\.online_renderer\.render_chat, .*drop aot from VLLM_PLUG"
    ):
        compat.observe_rendered_chats(state, lambda _: None)


@pytest.mark.parametrize(("rank", "first"), [(-1, True), (0, True), (1, False), (3, False)])
def test_one_of_several_api_servers_is_the_first(rank, first):
    parallel_config = ParallelConfig(_api_process_count=4, _api_process_rank=rank)
    assert compat.is_first_api_server(SimpleNamespace(parallel_config=parallel_config)) is first


def test_a_vllm_that_does_not_number_its_api_servers_is_refused_by_name():
    with pytest.raises(UnsupportedError, match=r"ParallelConfig\._api_process_rank"):
        compat.is_first_api_server(SimpleNamespace(parallel_config=SimpleNamespace()))


RUNNER = "vllm.v1.worker.cpu_model_runner"


@pytest.fixture
def cpu_runner(monkeypatch):
    """Return a class that sets the flag as vLLM's runner for a CPU does, before it has a model."""

    class CPUModelRunner:
        def __init__(self):
            self.is_multimodal_pruning_enabled = False

    module = ModuleType(RUNNER)
    module.CPUModelRunner = CPUModelRunner
    monkeypatch.setitem(sys.modules, RUNNER, module)
    return CPUModelRunner


def test_the_cpu_runner_calls_its_hook_for_models_that_prune(cpu_runner):
    compat.let_cpu_runner_recompute_positions()
    installed = cpu_runner.is_multimodal_pruning_enabled
    compat.let_cpu_runner_recompute_positions()
    assert cpu_runner.is_multimodal_pruning_enabled is installed
    runner = cpu_runner()
    assert runner.is_multimodal_pruning_enabled is False
    runner.model = SimpleNamespace(is_multimodal_pruning_enabled=True)
    assert runner.is_multimodal_pruning_enabled is True
    runner.model = SimpleNamespace()
    assert runner.is_multimodal_pruning_enabled is False


def test_a_vllm_without_the_cpu_runner_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, RUNNER, ModuleType(RUNNER))
    with pytest.raises(UnsupportedError, match=r"has no CPUModelRunner, .*install vllm 0\.32\.\*"):
        compat.let_cpu_runner_recompute_positions()


PROPOSER = "vllm.v1.spec_decode.llm_base_proposer"


@pytest.fixture
def proposer(monkeypatch):
    """Return a class that tells target models apart as vLLM's proposer does, by the name of their class."""

    class SpecDecodeBaseProposer:
        def get_model_name(self, model):
            return type(model).__name__

    module = ModuleType(PROPOSER)
    module.SpecDecodeBaseProposer = SpecDecodeBaseProposer
    monkeypatch.setitem(sys.modules, PROPOSER, module)
    return SpecDecodeBaseProposer


def test_a_proposer_recognises_a_reduced_model_as_the_model_it_derives_from(proposer):
    for _ in range(2):
        compat.let_proposer_know_reduced_models()
    architecture = "Qwen2_5_VLForConditionalGeneration"
    assert architecture in ARCHITECTURES
    in_tree = type(architecture, (), {"__module__": "vllm.model_executor.models.qwen2_5_vl"})
    mixin = type("ReducedQwenVL", (), {"__module__": "aot_vllm.adapters.qwen_vl"})
    reduced = type("AOTQwen2_5_VL", (mixin, in_tree), {"__module__": "aot_vllm.adapters.qwen2_5_vl"})
    other = type("Other", (in_tree,), {"__module__": "somewhere.models"})
    for model, name in ((reduced(), architecture), (in_tree(), architecture), (other(), "Other")):
        assert proposer().get_model_name(model) == name
    assert proposer().get_model_name(SimpleNamespace(module=reduced())) == architecture


def test_a_vllm_without_the_proposers_method_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, PROPOSER, ModuleType(PROPOSER))
    with pytest.raises(UnsupportedError, match=r"has no SpecDecodeBaseProposer\.get_model_name, .*vllm 0\.32\.\*"):
        compat.let_proposer_know_reduced_models()


ROPE = "vllm.v1.worker.gpu.mm.rope"


def test_a_delta_of_none_leaves_the_delta_that_is_known(monkeypatch):
    stored = []

    class RopeState:
        prefill_delta = SimpleNamespace(np=[7, -30])

        def update_prefill_positions(self, req_idx, positions, delta):
            stored.append((req_idx, positions, delta))

    module = ModuleType(ROPE)
    module.RopeState = RopeState
    monkeypatch.setitem(sys.modules, ROPE, module)
    for _ in range(2):
        compat.let_rope_state_keep_known_deltas()
    RopeState().update_prefill_positions(1, "positions", None)
    RopeState().update_prefill_positions(0, "positions", 5)
    assert stored == [(1, "positions", -30), (0, "positions", 5)]


def test_a_vllm_without_the_rope_states_method_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, ROPE, ModuleType(ROPE))
    with pytest.raises(UnsupportedError, match=r"has no RopeState\.update_prefill_positions, .*vllm 0\.32\.\*"):
        compat.let_rope_state_keep_known_deltas()


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (RUNNER, compat.let_cpu_runner_recompute_positions),
        (PROPOSER, compat.let_proposer_know_reduced_models),
        (ROPE, compat.let_rope_state_keep_known_deltas),
    ],
)
def test_a_module_that_vllm_has_not_loaded_is_not_loaded(monkeypatch, module, function):
    monkeypatch.delitem(sys.modules, module, raising=False)
    function()
    assert module not in sys.modules


class Steps:
    """An engine core with steps in flight, whose executor answers in order as vLLM's for several workers does."""

    def __init__(self, *, steps):
        from vllm.v1.executor.multiproc_executor import FutureWrapper

        self.model_executor = self
        self.futures_queue = deque()
        self.answered = []
        self.batch_queue = [FutureWrapper(self.futures_queue, lambda n=n: self.answer(n)) for n in range(steps)]

    def answer(self, what):
        self.answered.append(what)
        return what

    def collective_rpc(self, method, non_block=False):
        from vllm.v1.executor.multiproc_executor import FutureWrapper

        future = FutureWrapper(self.futures_queue, lambda: self.answer(method))
        return future if non_block else future.result()


@pytest.fixture
def statistics():
    from vllm.v1.engine.core import EngineCore

    compat.let_engine_report_statistics()
    return EngineCore.aot_reduction_statistics


def test_statistics_wait_for_no_step_in_flight_and_come_after_it(statistics):
    core = Steps(steps=2)
    future = statistics(core)
    assert core.answered == []
    assert not future.done()
    assert [step.result() for step in core.batch_queue] == [0, 1]
    assert not future.done()
    core.batch_queue.clear()
    assert statistics(core) == compat.STATISTICS_METHOD  # of an idle engine, which answers whoever asked before too
    assert future.result() == compat.STATISTICS_METHOD


def test_statistics_of_an_executor_that_answers_at_once_are_asked_for_as_such(statistics):
    executor = SimpleNamespace(collective_rpc=lambda method: [method])
    core = SimpleNamespace(model_executor=executor, batch_queue=["a step"])
    assert statistics(core) == [compat.STATISTICS_METHOD]


async def test_a_client_without_a_call_to_all_engines_is_refused_by_name():
    with pytest.raises(UnsupportedError, match=r"has no AsyncLLM\.engine_core\.call_utility_all_async"):
        await compat.statistics_of_engines(SimpleNamespace(engine_core=object()))


def test_a_vllm_without_calls_to_workers_is_refused_by_name(monkeypatch):
    import vllm.v1.engine.core as module

    monkeypatch.delattr(module.EngineCore, "collective_rpc")
    with pytest.raises(UnsupportedError, match=r"has no EngineCore\.collective_rpc"):
        compat.let_engine_report_statistics()
