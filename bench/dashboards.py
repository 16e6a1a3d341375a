"""The dashboards as pictures: each panel's queries, asked of a real Prometheus beside a real engine and gateway.

    python bench/dashboards.py --out docs/dashboards

The engine serves a tiny model with random weights; users of the load test ask about videos, whole and reduced, and
about text, and some requests are refused. Grafana takes no part: matplotlib draws, with its titles, units and places.
It needs the extra `draw`, beside those of the engine and the gateway, and Debian's package prometheus.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Any

import httpx
import matplotlib.pyplot as plt
import yaml
from matplotlib.axes import Axes
from matplotlib.dates import DateFormatter, date2num
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image
from PIL.PngImagePlugin import PngInfo

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.machine import describe, engine_versions  # noqa: E402 - found through the line above
from bench.servers import free_port, process  # noqa: E402
from demo.checkpoint import PRESETS, make_llava_onevision  # noqa: E402
from demo.stack import REDUCED, WHOLE, engine_command, engine_environment, gateway_config  # noqa: E402

DASHBOARDS = ROOT / "deploy" / "grafana" / "dashboards"
PROMETHEUS = ROOT / "deploy" / "prometheus"
RETENTION = 0.10
SCRAPE_SECONDS = 5
COLUMNS = 24
COLOURS = 128
INCHES = 0.62, 0.38  # of a column and of a row
Series = list[tuple[str, list[float], list[float]]]
"""A line's name, its times in days as matplotlib counts them, its values."""


@dataclass(frozen=True)
class Window:
    """The time that is looked at, in seconds since the epoch, and the Prometheus that is asked."""

    client: httpx.Client
    start: float
    end: float

    def lines(self, target: dict[str, Any], variables: dict[str, str]) -> Series:
        """Return what Grafana would draw for one query of a panel."""
        expression = target["expr"]
        for name, value in variables.items():
            expression = expression.replace(f"${name}", value)
        asked = {"query": expression, "start": self.start, "end": self.end, "step": SCRAPE_SECONDS}
        answer = self.client.get("/api/v1/query_range", params=asked).raise_for_status().json()
        return [
            (
                _legend(target["legendFormat"], result["metric"]),
                [_day(seconds) for seconds, _ in result["values"]],
                [float(value) for _, value in result["values"]],
            )
            for result in answer["data"]["result"]
        ]


def _day(seconds: float) -> float:
    return float(date2num(datetime.fromtimestamp(seconds, UTC)))


def _legend(form: str, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), form)


@contextmanager
def servers(folder: Path) -> Iterator[tuple[str, str]]:
    """Start an engine, a gateway and Prometheus; give the addresses of the last two."""
    checkpoint, config = folder / "model", folder / "gateway.yaml"
    make_llava_onevision(checkpoint, PRESETS["tiny"])
    config.write_text(gateway_config(RETENTION))
    engine, gateway, prometheus = (f"127.0.0.1:{free_port()}" for _ in range(3))
    serve = engine_command(str(checkpoint), int(engine.rpartition(":")[2]), retention=RETENTION)
    settings = {
        "AOT_GATEWAY_PORT": gateway.rpartition(":")[2],
        "AOT_GATEWAY_ENGINES": f"http://{engine}",
        "AOT_GATEWAY_CONFIG": str(config),
        "PYTHONPATH": str(ROOT),
    }
    watch = [
        "prometheus",
        f"--config.file={_configuration(folder, {'gateway:8080': gateway, 'engine:8000': engine})}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={prometheus}",
    ]
    with (
        process(serve, health=f"http://{engine}/health", environment=engine_environment()),
        process([sys.executable, "-m", "server"], health=f"http://{gateway}/health/ready", environment=settings),
        process(watch, health=f"http://{prometheus}/-/ready"),
    ):
        yield f"http://{gateway}", f"http://{prometheus}"


def _configuration(folder: Path, addresses: dict[str, str]) -> Path:
    """Write the deployed configuration with other addresses and intervals."""
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": f"{SCRAPE_SECONDS}s", "evaluation_interval": f"{SCRAPE_SECONDS}s"}
    config["rule_files"] = [str(PROMETHEUS / "rules" / "*.yml")]
    for job in config["scrape_configs"]:
        for group in job["static_configs"]:
            [target] = group["targets"]
            group |= {"targets": [addresses[target]], "labels": {"instance": target}}
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


def load(gateway: str, *, seconds: int) -> None:
    """Have users ask in a spike, and now and then something that is refused."""
    command = [
        *(sys.executable, "-m", "locust", "-f", str(ROOT / "loadtest" / "locustfile.py"), "--headless"),
        *("--only-summary", "--host", gateway, "--users", "6", "--run-time", f"{seconds}s", "--shape", "spike"),
        *("--arms", f"off={WHOLE},aot={REDUCED}", "--text-share", "0.2", "--sizes", "160x120", "--frames", "40"),
        *("--stop-timeout", "60"),
    ]
    wrong = [{"model": "none such"}, {"model": REDUCED, "aot": {"retention": 7}}, {"model": WHOLE, "max_tokens": 10**6}]
    with (
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT) as locust,
        httpx.Client(base_url=gateway, timeout=60) as client,
    ):
        while locust.poll() is None:
            for fields in wrong:
                messages = [{"role": "user", "content": "What happens?"}]
                client.post("/v1/chat/completions", json={"messages": messages, **fields})
                time.sleep(2)
    if locust.returncode:
        sys.exit(f"the users' requests failed: locust ended with {locust.returncode}")


def draw(board: dict[str, Any], window: Window, path: Path, *, note: str) -> None:
    """Write a dashboard's picture, with the titles of its panels in the file."""
    panels = board["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = plt.figure(figsize=(COLUMNS * INCHES[0], rows * INCHES[1] + 0.7), layout="constrained")
    grid = figure.add_gridspec(rows, COLUMNS)
    variables = {"__rate_interval": f"{4 * SCRAPE_SECONDS}s", "__range": f"{window.end - window.start:.0f}s"}
    variables |= {one["name"]: one.get("allValue") or one["query"] for one in board["templating"]["list"]}
    for panel in panels:
        place = panel["gridPos"]
        axes = figure.add_subplot(
            grid[place["y"] : place["y"] + place["h"], place["x"] : place["x"] + place["w"]], facecolor="white"
        )
        lines = [line for target in panel["targets"] for line in window.lines(target, variables)]
        unit = panel["fieldConfig"]["defaults"]["unit"]
        axes.set_xlim(_day(window.start), _day(window.end))
        (_number if panel["type"] == "stat" else _lines)(axes, lines, unit=unit)
        axes.set_title(panel["title"], loc="left", fontsize=9, fontweight="bold")
    figure.suptitle(board["title"], x=0.01, ha="left", fontsize=13, fontweight="bold")
    figure.text(0.99, 0.995, note, ha="right", va="top", fontsize=7, color="grey")
    drawn, titles = io.BytesIO(), PngInfo()
    figure.savefig(drawn, dpi=72, facecolor="#f4f5f5")
    plt.close(figure)
    titles.add_text("Description", json.dumps([panel["title"] for panel in panels]))
    Image.open(drawn).convert("RGB").quantize(COLOURS).save(path, optimize=True, pnginfo=titles)


def _number(axes: Axes, lines: Series, *, unit: str) -> None:
    axes.set_axis_off()
    for _, times, values in lines:
        axes.fill_between(times, values, color="tab:green", alpha=0.15)
    text = in_unit(lines[0][2][-1], unit) if lines else "no data"
    axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=20, color="tab:green", transform=axes.transAxes)


def _lines(axes: Axes, lines: Series, *, unit: str) -> None:
    lines = [line for line in lines if any(line[2])] or lines  # of many, those that say something
    for name, times, values in lines:
        axes.plot(times, values, linewidth=1, label=name, clip_on=False)
        axes.fill_between(times, values, alpha=0.08)
    finite = [value for _, _, values in lines for value in values if isfinite(value)]
    axes.set_ylim(0, 1.08 * max(finite, default=0) or 1)
    if unit == "bool_on_off":
        axes.set_yticks([0, 1])
        axes.set_ylim(0, 1.08)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: in_unit(value, unit)))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(DateFormatter("%H:%M:%S"))
    axes.tick_params(labelsize=7, length=0)
    axes.grid(alpha=0.25)
    axes.spines[:].set_visible(False)
    if lines:
        axes.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=4, frameon=False)


def in_unit(value: float, unit: str) -> str:
    """Return a value as Grafana writes it in one of the units that the dashboards use."""
    if unit == "percentunit":
        return f"{100 * value:.3g}%"
    if unit == "bool_on_off":
        return "On" if value else "Off"
    if unit == "currencyUSD":
        return f"${value:.2g}"
    if unit == "s":
        return f"{value * 1e3:.3g} ms" if abs(value) < 1 else f"{value:.3g} s"
    if unit == "bytes":
        return f"{value / 2**10:.3g} KiB"
    ending = {"reqps": " req/s", "ops": " ops/s", "short": ""}[unit]
    return (f"{value / 1e3:.3g} K" if abs(value) >= 1e3 else f"{value:.3g}") + ending


def main() -> None:
    """Start everything, put load on it, draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "dashboards")
    parser.add_argument("--seconds", type=int, default=300, help="of load")
    arguments = parser.parse_args()
    if shutil.which("prometheus") is None:
        sys.exit("Prometheus is not installed (Debian has it in the package prometheus)")
    arguments.out.mkdir(parents=True, exist_ok=True)
    note = describe(engine_versions())
    with tempfile.TemporaryDirectory() as folder, servers(Path(folder)) as (gateway, prometheus):
        start = time.time()
        load(gateway, seconds=arguments.seconds)
        time.sleep(2 * SCRAPE_SECONDS)
        with httpx.Client(base_url=prometheus, timeout=30) as client:
            window = Window(client, start, time.time())
            for path in sorted(DASHBOARDS.glob("*.json")):
                draw(json.loads(path.read_text()), window, arguments.out / f"{path.stem}.png", note=note)


if __name__ == "__main__":
    main()
