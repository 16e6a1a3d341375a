"""One run of lmms-eval with the gateway as its model, in lmms-eval's own environment; `bench/accuracy.py` starts it.

lmms-eval's OpenAI model asks; here its videos are uploaded to the gateway's Files API once each, and every request says
how much of them to keep. The last line it prints is its result, JSON.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
import threading
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import av
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models.chat.openai import OpenAICompatible
from lmms_eval.tasks import TaskManager
from PIL import Image

FRAMES_PER_SECOND = 3  # of the videos that MVBench has as pictures


class Client:
    """OpenAI's client as lmms-eval uses it, for a gateway that neither reads local files nor takes a list of frames."""

    def __init__(self, client: Any, retention: float) -> None:
        """Wrap a client of the gateway."""
        self.client = client
        self.retention = retention
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self.create))
        self.before = self.after = self.answered = 0
        self._lock = threading.Lock()
        self._uploads: dict[str, threading.Lock] = {}
        self._ids: dict[str, str] = {}

    def create(self, *, messages: list[dict[str, Any]], extra_body: Any = None, **payload: Any) -> Any:
        """Ask; how many frames are looked at is the engine's to say, so `extra_body` is left out."""
        asked = [{**message, "content": self._content(message["content"])} for message in messages]
        body = {"aot": {"retention": self.retention}}
        answer = self.client.chat.completions.create(messages=asked, extra_body=body, **payload)
        tokens = (answer.usage.model_extra or {}).get("video_tokens") or {"before": 0, "after": 0}
        with self._lock:
            self.answered += 1
            self.before += tokens["before"]
            self.after += tokens["after"]
        return answer

    def _content(self, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        pictures = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        if len(pictures) > 1:
            return [
                self._file("".join(pictures), as_video(pictures)),
                *(part for part in parts if part["type"] != "image_url"),
            ]
        return [self._video(part) if part["type"] == "video_url" else part for part in parts]

    def _video(self, part: dict[str, Any]) -> dict[str, Any]:
        url = part["video_url"]["url"]
        if not url.startswith("file:"):
            return part
        return self._file(url, unquote(urlsplit(url).path))

    def _file(self, key: str, source: str | io.BytesIO) -> dict[str, Any]:
        with self._lock:
            lock = self._uploads.setdefault(key, threading.Lock())
        with lock:
            if key not in self._ids:
                file = open(source, "rb") if isinstance(source, str) else source  # noqa: SIM115
                with file:
                    uploaded = self.client.files.create(file=("video.mp4", file), purpose="video")
                self._ids[key] = uploaded.id
        return {"type": "file", "file": {"file_id": self._ids[key]}}

    def delete_uploads(self) -> None:
        """Delete what was uploaded."""
        for file in self._ids.values():
            self.client.files.delete(file)


def as_video(pictures: list[str]) -> io.BytesIO:
    """Return pictures, data URLs, as an H.264 file."""
    frames = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB") for url in pictures]
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options={"crf": "16"})
        stream.width, stream.height = (side - side % 2 for side in frames[0].size)
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame.resize((stream.width, stream.height)))))
        container.mux(stream.encode())
    file.seek(0)
    return file


def main() -> None:
    """Evaluate and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--api-key", default="unused")
    parser.add_argument("--model", required=True)
    parser.add_argument("--retention", type=float, required=True)
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--include", help="directory with further tasks")
    parser.add_argument("--limit", type=int, help="questions of each task")
    parser.add_argument("--concurrency", type=int, default=8)
    arguments = parser.parse_args()
    model = OpenAICompatible(
        model_version=arguments.model,
        base_url=arguments.base_url,
        api_key=arguments.api_key,
        timeout=1200,
        max_retries=3,
        num_concurrent=arguments.concurrency,
        pass_video_url=True,
    )
    model.client = client = Client(model.client, arguments.retention)
    results = simple_evaluate(
        model,
        tasks=arguments.tasks,
        limit=arguments.limit,
        task_manager=TaskManager(include_path=arguments.include),
        bootstrap_iters=0,
    )
    client.delete_uploads()
    asked = sum(len(samples) for samples in results["samples"].values())
    if client.answered < asked:
        sys.exit(f"{asked - client.answered} of {asked} questions got no answer, see above")
    scores = {name: numbers(metrics) for name, metrics in results["results"].items()}
    counts = {name: len(samples) for name, samples in results["samples"].items()}
    print(json.dumps({"scores": scores, "counts": counts, "before": client.before, "after": client.after}))


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Return a task's metrics by name, without their filters and errors."""
    return {
        name.partition(",")[0]: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and "stderr" not in name and not isinstance(value, bool)
    }


if __name__ == "__main__":
    main()
