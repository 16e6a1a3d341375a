"""Two data-parallel engines behind one API server, which tells what both of them have reduced."""

import httpx
import pytest

from demo.tiny_checkpoints import checkpoint
from tests.e2e.engines import free_port, process, serve_command
from tests.e2e.test_engine_server import ask, clips, counters

__all__ = ["clips"]


@pytest.mark.slow
def test_counters_are_sums_over_engines(tmp_path, clips):
    """Each request names a retention that none before it has named, so that no engine finds its video in a cache."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = serve_command(
        checkpoint("tiny"),
        port,
        "--video-pruning-rate=0.75",
        "--served-model-name=tiny",
        "--data-parallel-size=2",
        "--api-server-count=1",
    )
    apart = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    with (
        process(command, health=f"{address}/health", log=tmp_path / "log", environment=apart, timeout_seconds=250),
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        for hundredths in range(40, 46):
            ask(client, clips[0], mm_processor_kwargs={"aot_retention": hundredths / 100})
        assert counters(client)["aot_engine_reductions_total"] == 6
