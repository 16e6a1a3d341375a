"""Users who ask about videos and read the answers as streams, for locust.

`python -m locust -f loadtest/locustfile.py -H GATEWAY`. Rows of the statistics are E2E (the requests), TTFT, ITL,
GATEWAY (the gateway's own time) and TOKENS, which holds counts where the others hold milliseconds. A user asks, reads
to the end and asks again: a closed loop. The exit code is 1 if an objective is missed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import gevent
from locust import FastHttpUser, LoadTestShape, constant, events, task
from locust.contrib.fasthttp import FAILURE_EXCEPTIONS
from locust.runners import WorkerRunner
from locust.stats import CSV_STATS_INTERVAL_SEC

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the `locust` command knows no working directory

from loadtest.arms import Arm, arms_in
from loadtest.shapes import SHAPES, stages, users_at
from loadtest.stream import Answer, read_answer
from loadtest.videos import Library, sizes_in
from loadtest.workers import LastReports

CHAT = "/v1/chat/completions"
OVERHEAD = "x-aot-gateway-overhead-ms"
TEXT = "text"
"""The rows' name for requests without a video."""
ANSWER_SECONDS = 600
PAUSE_SECONDS = 1.0  # after a failure: a refusal takes no time, and users would only send more requests
UNLIMITED_SECONDS = 3600.0  # that a shape takes without --run-time
_newcomers = itertools.count()


@events.init_command_line_parser.add_listener
def _(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Questions and objectives")
    group.add_argument(
        "--arms",
        type=_checked(arms_in),
        default="off=demo,aot=demo-reduced",
        help="NAME=MODEL or NAME=MODEL@RETENTION, comma-separated; each user takes them in turn",
    )
    group.add_argument("--text-share", type=_share, default=0.0, help="share of requests without a video")
    group.add_argument("--repeat-share", type=_share, default=0.5, help="share of videos that are sent repeatedly")
    group.add_argument(
        "--sizes", type=_checked(sizes_in), default="480x360", help="of the videos, WxH, comma-separated"
    )
    group.add_argument("--clips", type=_count, default=4, help="videos of each size")
    group.add_argument("--frames", type=_count, default=64, help="frames of a video, at 8 a second")
    group.add_argument("--max-tokens", type=_count, default=16, help="longest answer")
    group.add_argument("--shape", choices=SHAPES, default="soak", help="how the number of users changes")
    group.add_argument("--slo-ttft-p95", type=float, help="objective: maximum p95 of each TTFT row, in seconds")
    group.add_argument("--slo-error-share", type=_share, default=0.0, help="objective: maximum share of failures")


def _checked(parse: Callable[[str], Any]) -> Callable[[str], str]:
    """Return an argument type that keeps the text, which travels to the workers, if `parse` takes it."""

    def check(text: str) -> str:
        try:
            parse(text)
        except ValueError as exc:
            raise argparse.ArgumentTypeError(str(exc)) from None
        return text

    return check


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = float("nan")
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"a share must be in [0, 1], got {text}")
    return share


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


class Shape(LoadTestShape):
    """The number of users over time, as --shape names it."""

    use_common_options = True

    def tick(self) -> tuple[int, float] | None:
        """Return users and spawn rate of this moment, None to end the test."""
        options = self.runner.environment.parsed_options
        most = options.num_users or 1
        plan = stages(options.shape, users=most, seconds=options.run_time or UNLIMITED_SECONDS)
        users = users_at(self.get_run_time(), plan)
        return None if users is None else (users, options.spawn_rate or most)


class Viewer(FastHttpUser):
    """Asks, reads the answer to its end, asks again."""

    wait_time = constant(0)
    network_timeout = ANSWER_SECONDS
    connection_timeout = 10.0

    def on_start(self) -> None:
        """Begin with another arm than the user before."""
        self._turns = itertools.count(next(_newcomers))

    @task
    def ask(self) -> None:
        """Ask one question and report on its answer."""
        options = self.environment.parsed_options
        arm: Arm = self.environment.aot_arms[next(self._turns) % len(self.environment.aot_arms)]
        library: Library = self.environment.aot_library
        is_text = random.random() < options.text_share
        video_url = None if is_text else library.pick(repeat_share=options.repeat_share)
        name = TEXT if is_text else arm.name
        body = json.dumps(arm.request(video_url, max_tokens=options.max_tokens)).encode()
        began = perf_counter()
        with self.client.post(
            CHAT, data=body, headers=_headers(), name=name, stream=True, catch_response=True
        ) as response:
            response.request_meta["request_type"] = "E2E"
            problem = self._read(response, name, began)
            if problem is not None:
                response.failure(problem)
        if problem is not None:
            gevent.sleep(PAUSE_SECONDS)

    def _read(self, response: Any, name: str, began: float) -> str | None:
        """Read the stream to its end and report its rows; return what was wrong with it."""
        if response.status_code != 200:
            return _refusal(response)
        try:
            answer = read_answer(iter(lambda: response.stream.readline(b"\n"), b""), perf_counter)
        except (*FAILURE_EXCEPTIONS, ValueError) as exc:
            return f"the stream could not be read: {type(exc).__name__}"
        response.request_meta["response_time"] = (perf_counter() - began) * 1e3
        if answer.problem is None:
            self._report("GATEWAY", name, float(response.headers[OVERHEAD]))
            self._report_answer(answer, name, began)
        return answer.problem

    def _report_answer(self, answer: Answer, name: str, began: float) -> None:
        assert answer.first_token is not None
        self._report("TTFT", name, (answer.first_token - began) * 1e3)
        for gap in answer.gaps:
            self._report("ITL", name, gap * 1e3)
        for kind, count in answer.tokens().items():
            self._report("TOKENS", f"{name}, {kind}", count)

    def _report(self, row: str, name: str, value: float) -> None:
        self.environment.events.request.fire(
            request_type=row, name=name, response_time=value, response_length=0, exception=None, context={}
        )


def _headers() -> dict[str, str]:
    key = os.environ.get("AOT_API_KEY")
    return {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}


def _refusal(response: Any) -> str:
    if not response.status_code:
        return f"no answer: {type(response.error).__name__}"
    try:
        code = response.json()["error"]["code"]
    except (ValueError, KeyError, TypeError):
        code = "no error object"
    return f"{response.status_code} {code}"


@events.init.add_listener
def _(environment: Any, **_: Any) -> None:
    environment.aot_last_reports = LastReports(environment)


@events.test_start.add_listener
def _(environment: Any, **_: Any) -> None:
    options = environment.parsed_options
    environment.aot_arms = arms_in(options.arms)
    environment.aot_library = Library(sizes=sizes_in(options.sizes), num_clips=options.clips, frames=options.frames)


@events.test_stop.add_listener
def _(environment: Any, **_: Any) -> None:
    environment.aot_last_reports.wait()
    if environment.parsed_options.csv_prefix and not isinstance(environment.runner, WorkerRunner):
        gevent.sleep(2 * CSV_STATS_INTERVAL_SEC)  # the files are written now and then, and not once more at the end


@events.quitting.add_listener
def _(environment: Any, **_: Any) -> None:
    if isinstance(environment.runner, WorkerRunner):
        return
    missed = list(missed_objectives(environment.stats, environment.parsed_options))
    for objective in missed:
        print(f"objective missed: {objective}", file=sys.stderr)
    environment.process_exit_code = 1 if missed else 0


def missed_objectives(stats: Any, options: argparse.Namespace) -> Any:
    """Yield a line for each objective that the statistics don't keep."""
    requests = [entry for entry in stats.entries.values() if entry.method == "E2E"]
    asked = sum(entry.num_requests for entry in requests)
    failed = sum(entry.num_failures for entry in requests)
    if asked == 0:
        yield "no request was answered or refused"
    elif failed / asked > options.slo_error_share:
        yield f"{failed} of {asked} requests failed, {options.slo_error_share:.2%} may"
    for entry in stats.entries.values():
        if entry.method == "TTFT" and options.slo_ttft_p95 is not None:
            seconds = entry.get_response_time_percentile(0.95) / 1e3
            if seconds > options.slo_ttft_p95:
                yield f"the p95 of {entry.name}'s TTFT is {seconds:.3g} s, {options.slo_ttft_p95:g} s are allowed"
