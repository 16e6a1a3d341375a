"""The time that the gateway says a reduction has saved, beside the time that it has.

    python bench/savings.py --out bench/results/savings.md

Both models of the demo are served by real vLLM behind the gateway. Each clip is asked about whole and reduced, one
request at a time, the order taking turns. Its frames are read before, so that neither question waits for them. The
difference of the two times to the first token is what a client waits less. What the gateway claims is the growth of
`prefill_seconds_saved` in `GET /v1/usage`. The vision tower runs for both questions, so its time is saved by neither.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.machine import describe, engine_versions  # noqa: E402 - found through the line above
from demo.clip import write_clip  # noqa: E402
from demo.run import Run, ask, client, video_part  # noqa: E402
from demo.stack import REDUCED, TRAINED_MODEL, WHOLE, random_model, stack  # noqa: E402

RETENTION = 0.10
WITHIN = 0.25
RESAMPLES = 2000
PROFILE_SECONDS = 12.0
"""After this time the gateway has read from the engine what the reductions of the warm-up took."""


@dataclass
class Answers:
    """The answers about each clip, whole and reduced, and the seconds that the gateway says the reduced one saved."""

    whole: list[Run] = field(default_factory=list)
    reduced: list[Run] = field(default_factory=list)
    claimed: list[float] = field(default_factory=list)

    @property
    def differences(self) -> list[float]:
        """The time to the first token that each clip took less when reduced."""
        pairs = zip(self.whole, self.reduced, strict=True)
        return [whole.first_token_seconds - reduced.first_token_seconds for whole, reduced in pairs]


def claimed(gateway: str) -> float:
    """Return the seconds that the gateway says it has saved so far."""
    report = httpx.get(f"{gateway}/v1/usage", timeout=30).raise_for_status().json()
    return float(report["total"]["prefill_seconds_saved"])


def have_read(gateway: str, clip: dict[str, object]) -> None:
    """Let the gateway read a clip's frames, which the questions about it then find."""
    content = [clip, {"type": "text", "text": "?"}]
    request: dict[str, Any] = {"model": WHOLE, "messages": [{"role": "user", "content": content}]}
    httpx.post(f"{gateway}/v1/video/tokens", json=request, timeout=120).raise_for_status()


def measure(model: str, *, clips: int) -> Answers:
    """Ask about so many clips, whole and reduced, after two that warm up."""
    answers = Answers()
    with tempfile.TemporaryDirectory() as folder:
        settings = {"AOT_GATEWAY_MEDIA_HANDOFF": "file", "AOT_GATEWAY_MEDIA_DIR": folder}
        flags = ("--allowed-local-media-path", folder)
        with stack(model, retention=RETENTION, gateway_settings=settings, engine_flags=flags) as gateway:
            asking = client(gateway)
            for number in range(-2, clips):
                path = Path(folder) / f"{number}.mp4"
                write_clip(path, seed=1000 + number)
                clip = video_part(path)
                have_read(gateway, clip)
                runs: dict[str, Run] = {}
                before = claimed(gateway)
                for name in (WHOLE, REDUCED) if number % 2 else (REDUCED, WHOLE):
                    runs[name] = ask(asking, name, clip, max_tokens=2)
                if number < 0:
                    time.sleep(PROFILE_SECONDS)
                    continue
                answers.whole.append(runs[WHOLE])
                answers.reduced.append(runs[REDUCED])
                answers.claimed.append(claimed(gateway) - before)
                print(f"{number}: {answers.differences[-1]:.3f} s, claimed {answers.claimed[-1]:.3f} s", flush=True)
    return answers


def interval(values: list[float]) -> tuple[float, float]:
    """Return the 95% interval of the median, by bootstrap."""
    draws = np.random.default_rng(0).choice(values, size=(RESAMPLES, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    return float(low), float(high)


def row(name: str, answers: Answers) -> tuple[str, float]:
    """Return a model's row of the table, and the share of the measured time that is claimed."""
    measured, said = statistics.median(answers.differences), statistics.median(answers.claimed)
    low, high = interval(answers.differences)
    whole, reduced = answers.whole[0], answers.reduced[0]
    ttft = [statistics.median(run.first_token_seconds for run in runs) for runs in (answers.whole, answers.reduced)]
    cells = [
        name,
        f"{whole.after:,}",
        f"{reduced.after:,}",
        *(f"{seconds:.3f} s" for seconds in ttft),
        f"{measured:.3f} s ({low:.3f} to {high:.3f})",
        f"{said:.3f} s",
        f"{said / measured:.2f}",
    ]
    return f"| {' | '.join(cells)} |", said / measured


def main() -> int:
    """Measure both models, write the table; return 1 if a claim is not within 25% of the measured time."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clips", type=int, default=24, help="about which each model is asked")
    parser.add_argument("--out", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    lines = [
        "| model | tokens whole | reduced | TTFT whole | reduced | saved, measured (95%) | saved, claimed | claimed / "
        "measured |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    shares = []
    for name, model in (("embedded", str(TRAINED_MODEL)), ("random weights", str(random_model()))):
        line, share = row(name, measure(model, clips=arguments.clips))
        lines.append(line)
        shares.append(share)
    asked = f"Medians over {arguments.clips} clips of 32 frames, one request at a time, retention {RETENTION:g}."
    text = "\n".join([*lines, "", f"{asked} {describe(engine_versions())}", ""])
    print(text)
    if arguments.out:
        arguments.out.write_text(text)
    return 0 if all(abs(share - 1) <= WITHIN for share in shares) else 1


if __name__ == "__main__":
    sys.exit(main())
