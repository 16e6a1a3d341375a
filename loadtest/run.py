"""Load on one screen: a real engine and the gateway, asked by locust's users, first whole and then reduced.

`make loadtest` runs it in `.venv`. One arm at a time, since requests of both would wait for each other in the engine.
CSV files and HTML reports of both are kept. Exit code 1: a request failed, or an objective was missed.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from demo.stack import (  # noqa: E402
    REDUCED,
    WHOLE,
    DemoError,
    console,
    interrupt_on_signals,
    random_model,
    retention_argument,
    stack,
)
from loadtest.arms import Arm  # noqa: E402
from loadtest.videos import Library  # noqa: E402

RESULTS = ROOT / ".cache" / "loadtest" / "results"
LAST_ANSWER_SECONDS = 300
Rows = dict[tuple[str, str], dict[str, str]]


def main() -> int:
    """Run the comparison; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a checkpoint that vLLM can load; the embedded one if not given")
    parser.add_argument("--retention", type=retention_argument, default=0.10, help="fraction of video tokens kept")
    parser.add_argument("--users", type=int, default=2, help="users who ask at the same time")
    parser.add_argument("--seconds", type=int, default=60, help="for each arm; running requests may finish")
    arguments = parser.parse_args()
    interrupt_on_signals()
    arms = {"off": Arm("off", WHOLE), "aot": Arm("aot", REDUCED)}
    try:
        with stack(arguments.model or str(random_model()), retention=arguments.retention) as gateway:
            with console.status("Warming up"):
                warm_up(gateway, arms["aot"])
            status = 0
            for arm in arms.values():
                status |= load(gateway, arm, users=arguments.users, seconds=arguments.seconds)
    except DemoError as exc:
        console.print(str(exc), style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("Stopped.")
        return 130
    show({name: rows(name) for name in arms}, retention=arguments.retention)
    console.print(f"reports  {RESULTS}")
    return status


def warm_up(gateway: str, arm: Arm) -> None:
    """Have the first-use costs of neither arm in the numbers."""
    url = Library(sizes=[(480, 360)], num_clips=1, frames=64).pick(repeat_share=1)
    body = json.dumps(arm.request(url, max_tokens=2)).encode()
    request = urllib.request.Request(
        f"{gateway}/v1/chat/completions", body, headers={"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=LAST_ANSWER_SECONDS) as answer:
        answer.read()


def load(gateway: str, arm: Arm, *, users: int, seconds: int) -> int:
    """Let users ask about videos that are new each time; return locust's exit code."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    command = [
        *(
            sys.executable,
            "-m",
            "locust",
            "-f",
            str(ROOT / "loadtest" / "locustfile.py"),
            "--headless",
            "--only-summary",
        ),
        *("--host", gateway, "--users", str(users), "--spawn-rate", str(users), "--run-time", f"{seconds}s"),
        *("--stop-timeout", str(LAST_ANSWER_SECONDS), "--arms", f"{arm.name}={arm.model}", "--repeat-share", "0"),
        *("--csv", str(RESULTS / arm.name), "--html", str(RESULTS / f"{arm.name}.html"), "--loglevel", "WARNING"),
    ]
    with console.status(f"{users} users, {arm.name}: {seconds} s and the last answers"), _ended(command) as locust:
        output, _ = locust.communicate()
    if locust.returncode:
        console.print(output, markup=False)
    return locust.returncode


@contextmanager
def _ended(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """Start a process that does not outlive the block."""
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def rows(name: str) -> Rows:
    """Return an arm's statistics by type and name."""
    with (RESULTS / f"{name}_stats.csv").open(newline="") as file:
        return {(row["Type"], row["Name"]): row for row in csv.DictReader(file)}


def show(arms: dict[str, Rows], *, retention: float) -> None:
    """Print the table."""
    table = Table(title="Videos that are new each time")
    for heading in ("", "every token", f"AOT, {retention:.0%} kept"):
        table.add_column(heading, justify="left" if not heading else "right")
    for title, row, column, unit in (
        ("requests answered", ("E2E", "{arm}"), "Request Count", ""),
        ("requests failed", ("E2E", "{arm}"), "Failure Count", ""),
        ("requests/s", ("E2E", "{arm}"), "Requests/s", ""),
        ("time to first token, median", ("TTFT", "{arm}"), "Median Response Time", "ms"),
        ("time to first token, p95", ("TTFT", "{arm}"), "95%", "ms"),
        ("between tokens, median", ("ITL", "{arm}"), "Median Response Time", "ms"),
        ("to the end, median", ("E2E", "{arm}"), "Median Response Time", "ms"),
        ("the gateway's own time, median", ("GATEWAY", "{arm}"), "Median Response Time", "ms"),
        ("prompt tokens a request", ("TOKENS", "{arm}, prompt"), "Average Response Time", ""),
        ("video tokens a request, before", ("TOKENS", "{arm}, video before"), "Average Response Time", ""),
        ("video tokens a request, after", ("TOKENS", "{arm}, video after"), "Average Response Time", ""),
    ):
        cells = [_cell(rows.get((row[0], row[1].format(arm=arm)), {}).get(column), unit) for arm, rows in arms.items()]
        table.add_row(title, *cells)
    console.print(table)
    console.print("Each user waits for an answer before asking again: a closed loop, as docs/loadtest.md explains.")


def _cell(text: str | None, unit: str) -> str:
    if text in (None, "N/A"):
        return "-"
    number = float(text)
    return f"{number:,.3g} {unit}".strip() if number < 100 else f"{number:,.0f} {unit}".strip()


if __name__ == "__main__":
    sys.exit(main())
