"""locust's users against a gateway and an engine's double, each in a process of its own."""

import asyncio
import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.harness import ROOT, EngineProcess, GatewayProcess

SMALL = ("--sizes", "64x48", "--frames", "8", "--clips", "1", "--max-tokens", "4")


class Load:
    """A finished run of locust."""

    def __init__(self, directory: Path, code: int, output: str) -> None:
        self.directory = directory
        self.code = code
        self.output = output

    def rows(self):
        with (self.directory / "load_stats.csv").open(newline="") as file:
            return {(row["Type"], row["Name"]): row for row in csv.DictReader(file)}

    def users(self):
        """How many there were, a second apart, up to the most."""
        with (self.directory / "load_stats_history.csv").open(newline="") as file:
            users = [int(row["User Count"]) for row in csv.DictReader(file)]
        return users[: users.index(max(users)) + 1]

    def count(self, kind, *names):
        rows = self.rows()
        return sum(int(rows[kind, name]["Request Count"]) for name in names)

    def median(self, kind, name):
        return float(self.rows()[kind, name]["Median Response Time"])

    def mean(self, kind, name):
        return float(self.rows()[kind, name]["Average Response Time"])


def locust(*options):
    return subprocess.Popen(
        [sys.executable, "-m", "locust", "-f", "loadtest/locustfile.py", *options],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
async def stack():
    async with EngineProcess() as engine, GatewayProcess(engine.url) as gateway:
        yield engine, gateway


@pytest.fixture
def load(tmp_path):
    """Runs locust without a display until its users have their last answers."""

    async def run(gateway, *options, seconds=2):
        started = locust(
            *("--headless", "--host", gateway.url),
            *("--users", "4", "--spawn-rate", "4", "--run-time", f"{seconds}s", "--stop-timeout", "20"),
            *("--csv", str(tmp_path / "load"), "--html", str(tmp_path / "load.html"), *SMALL, *options),
        )
        output, _ = await asyncio.to_thread(started.communicate, timeout=120)
        return Load(tmp_path, started.returncode, output)

    return run


async def test_answers_are_timed_in_rows_of_their_own_and_counted_as_the_gateway_counts_them(stack, load):
    engine, gateway = stack
    await engine.tell(delay_seconds=0.2, gap_seconds=0.1)
    arms = ("--arms", "off=llava@1,aot=llava@0.1", "--text-share", "0.4", "--repeat-share", "0.5")
    run = await load(gateway, *arms, "--slo-ttft-p95", "30", seconds=6)
    assert run.code == 0, run.output

    names = ("off", "aot", "text")
    requests = run.count("E2E", *names)
    assert requests == (await engine.told())["requests"]
    assert requests == await gateway.metric("requests_total", route="/v1/chat/completions", status_class="2xx")
    assert run.count("TTFT", *names) == run.count("GATEWAY", *names) == requests
    assert run.count("ITL", *names) == 3 * requests  # the double's answers have four chunks with text
    videos = run.count("E2E", "off", "aot")
    assert run.count("TOKENS", "off, video before", "aot, video before") == videos
    assert run.mean("TOKENS", "aot, video before") == 6272
    assert run.mean("TOKENS", "aot, video after") == 627
    assert await gateway.metric("video_tokens_total", stage="before") == 6272 * requests  # the double's headers
    assert 0 < await gateway.metric("probes_total") < videos, "some videos are new, some not"

    for name in names:  # the role's chunk, then four with text and two more, a gap between each: 0.1 s
        assert run.median("TTFT", name) >= 290
        assert run.median("ITL", name) >= 90
        assert run.median("E2E", name) >= run.median("TTFT", name) + 270
    assert "TTFT" in (run.directory / "load.html").read_text()


async def test_a_missed_objective_for_the_first_token_is_in_the_exit_code(stack, load):
    engine, gateway = stack
    await engine.tell(delay_seconds=0.2)
    run = await load(gateway, "--arms", "aot=llava@0.1", "--slo-ttft-p95", "0.1")
    assert run.code == 1, run.output
    assert "objective missed: the p95 of aot's TTFT is" in run.output
    assert run.output.count("objective missed") == 1


@pytest.mark.parametrize(("allowed", "code"), [("0.5", 1), ("1", 0)])
async def test_failed_requests_are_told_apart_and_break_the_objective_beyond_their_share(stack, load, allowed, code):
    engine, gateway = stack
    await engine.tell(dies_after=2)
    run = await load(gateway, "--arms", "off=llava@1,aot=nonsense", "--slo-error-share", allowed)
    assert run.code == code, run.output
    assert ("requests failed, 50.00% may" in run.output) == (code == 1)
    assert "error in the stream: engine_failed" in run.output
    assert "404 model_not_found" in run.output
    assert ("TTFT", "off") not in run.rows(), "a stream that broke is no sample"


async def test_a_gateway_that_does_not_answer_is_a_failure(load):
    class Nowhere:
        url = "http://127.0.0.1:9"

    run = await load(Nowhere, "--arms", "aot=llava")
    assert run.code == 1
    assert "no answer: ConnectionRefusedError" in run.output


async def test_a_wrong_option_does_not_start(load):
    class Nowhere:
        url = "http://127.0.0.1:9"

    run = await load(Nowhere, "--arms", "aot=llava@7")
    assert run.code == 2
    assert "arms must be like off=MODEL@1,aot=MODEL@0.10 or aot=ALIAS, got aot=llava@7" in run.output


@pytest.mark.slow
async def test_what_two_workers_ask_adds_up_at_their_master(stack, load, unused_tcp_port):
    engine, gateway = stack
    await engine.tell(delay_seconds=1.5)  # the last answers are still to come when the time is over
    workers = [locust("--worker", "--master-port", str(unused_tcp_port)) for _ in range(2)]
    try:
        at = ("--master-bind-host", "127.0.0.1", "--master-bind-port", str(unused_tcp_port))
        arms = ("--arms", "off=llava@1,aot=llava@0.1", "--repeat-share", "0", "--shape", "steps")
        run = await load(gateway, "--master", "--expect-workers", "2", *at, *arms, "--slo-ttft-p95", "30", seconds=6)
        assert run.code == 0, run.output
        told = [await asyncio.to_thread(worker.communicate, timeout=30) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], told
    assert run.users() == sorted(run.users())
    assert max(run.users()) == 4
    assert len(set(run.users())) > 2, "they come in steps"
    requests = run.count("E2E", "off", "aot")
    assert requests == (await engine.told())["requests"]
    assert requests == run.count("TTFT", "off", "aot") == run.count("GATEWAY", "off", "aot")
    assert run.count("ITL", "off", "aot") == 3 * requests
    assert run.mean("TOKENS", "aot, video after") == 627
    assert await gateway.metric("probes_total") == requests, "no worker sends what the other one has sent"


@pytest.mark.slow
async def test_objectives_are_those_of_all_workers_together(stack, load):
    engine, gateway = stack
    await engine.tell(delay_seconds=0.2, dies_after=2)
    run = await load(gateway, "--processes", "2", "--arms", "aot=llava@0.1", "--slo-error-share", "0.5", seconds=4)
    assert run.code == 1, run.output
    failed = run.count("E2E", "aot")
    assert failed == await gateway.metric("requests_total", route="/v1/chat/completions") > 4
    assert f"objective missed: {failed} of {failed} requests failed, 50.00% may" in run.output
    assert run.output.count("objective missed") == 1, "the master judges, and it alone"
