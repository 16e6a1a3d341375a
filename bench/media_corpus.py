"""Reads every file of a folder as the gateway does, and compares what it makes of it with a full decode.

    python bench/media_corpus.py DIRECTORY

Each file is read twice by the gateway's reader: 32 frames at even distances, as LLaVA-OneVision has them, and two a
second, as Qwen3-VL has them. Frames, size, duration and the frames that were chosen are compared with a full decode
(`bench/full_decode.py`), which shares no code with the reader. A line tells of each file that disagrees or is refused,
and the last lines sum up. The exit status is 1 if a file disagrees.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.full_decode import THUMBNAIL, Decoded  # noqa: E402 - found through the line above
from server.errors import MediaRefused  # noqa: E402
from server.media.examine import refusal, type_of  # noqa: E402
from server.media.readers import Reader  # noqa: E402
from server.reader.facts import Limits, ReadError  # noqa: E402
from server.reader.frames_file import FramesHeader, read_header  # noqa: E402
from server.reader.wanted import Reading, Wanted  # noqa: E402
from server.settings import Settings  # noqa: E402

UNIFORM = {"rule": "uniform", "num_frames": 32}
BY_RATE = {"rule": "qwen3_vl", "fps": 2, "min_frames": 4, "max_frames": 768}
SIZE = {"rule": "fixed", "height": 384, "width": 384}
SHADES = 12
"""How far the shades of two thumbnails of one frame are apart, on average, at most."""
ANSWER_BYTES = 2**28
AGREE, DISAGREE, REFUSED, NOT_COMPARED = "agree", "disagree", "refused", "not compared"


@dataclass(frozen=True)
class Result:
    """What became of one file."""

    outcome: str
    text: str = ""
    code: str = ""
    """Of a refusal."""


def expected(frames: int, seconds: float, sampling: dict[str, object]) -> list[int]:
    """Return the frames that a model is to see of so many."""
    count = min(frames, 32)
    if sampling is BY_RATE:
        count = min(max(int(seconds * 2), 4), 768, frames)
        return [0, 0] if frames == 1 else [int(index) for index in np.linspace(0, frames - 1, count).round()]
    return [int(index) for index in np.linspace(0, frames - 1, count, dtype=int)]


def differences(reading: Reading, sampling: dict[str, object], pictures: Sequence[np.ndarray], whole: Decoded) -> str:
    """Return in which ways what was read differs from what is there; nothing if it doesn't."""
    facts, found = reading.facts, []
    lost = facts.frames - whole.frames
    if not 0 <= lost <= whole.errors:  # packets that can't be decoded count, and others stand for them
        found.append(f"{facts.frames} frames, {whole.frames} in a full decode")
    if (facts.width, facts.height) != (whole.width, whole.height):
        found.append(f"{facts.width} x {facts.height}, {whole.width} x {whole.height} in a full decode")
    slack = max(1.5 * whole.seconds / max(whole.frames, 1), 0.01 * whole.seconds, 0.02)
    if not lost and abs(facts.duration_seconds - whole.seconds) > slack:
        found.append(f"{facts.duration_seconds:.3f} seconds, {whole.seconds:.3f} in a full decode")
    indices = list(reading.header.frames_indices)
    if not found and not lost and indices != (right := expected(whole.frames, facts.duration_seconds, sampling)):
        found.append(f"frames {indices} were chosen, {right} were to be")
    if wrong := mistaken(indices, pictures, whole, lost=max(lost, 0)):
        found.append("other pictures: " + ", ".join(wrong))
    return "; ".join(found)


def mistaken(indices: Sequence[int], pictures: Sequence[np.ndarray], whole: Decoded, *, lost: int) -> list[str]:
    """Return which of the frames handed over look like other frames than those that they are said to be.

    Of those that count, so many are `lost` to the full decode.
    """
    all_frames = np.asarray(whole.thumbnails, float).reshape(whole.frames, -1)
    wrong = []
    for index, picture in zip(indices, pictures, strict=True):
        small = Image.fromarray(picture).convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
        apart = np.abs(all_frames - np.asarray(small, float).ravel()).mean(axis=1)
        if not (apart[max(index - lost, 0) : index + 1] <= SHADES).any():
            wrong.append(f"{index} (nearest {int(apart.argmin())}, {apart.min():.0f} shades off)")
    return wrong


class Corpus:
    """Reads and decodes files, so many at a time."""

    def __init__(self, *, seconds: float, jobs: int) -> None:
        """Take the time that a full decode of a file may last."""
        settings = Settings()
        self._seconds = seconds
        self._decoders: list[asyncio.subprocess.Process] = []
        self._max_bytes = settings.media_max_decoded_bytes
        self._slots = asyncio.Semaphore(jobs)
        self.reader = Reader(
            limits=Limits(
                max_seconds=settings.media_max_seconds,
                max_pixels=settings.media_max_pixels,
                max_frames=settings.media_max_frames,
                sampled_frames=settings.media_sampled_frames,
            ),
            seconds=settings.media_read_seconds,
            num_workers=jobs,
            max_frames_bytes=settings.media_max_decoded_bytes,
        )

    async def judge(self, path: Path) -> Result:
        """Return what becomes of a file."""
        async with self._slots:
            whole = await self._decoded(path)
            there = f"{whole.frames} frames in a full decode" if isinstance(whole, Decoded) else whole
            found = []
            for sampling in (UNIFORM, BY_RATE):
                try:
                    reading, pictures = await self._read(path, sampling)
                except MediaRefused as exc:
                    code = exc.code or "invalid_media"
                    return Result(REFUSED, f"{code}: {exc} ({there})", code)
                if not isinstance(whole, Decoded):
                    return Result(NOT_COMPARED, f"{reading.facts.frames} frames; {whole}")
                found.append(differences(reading, sampling, pictures, whole))
        text = " | ".join(dict.fromkeys(filter(None, found)))
        return Result(DISAGREE, f"{text} ({reading.facts.container}, {reading.facts.codec})") if text else Result(AGREE)

    async def _read(self, path: Path, sampling: dict[str, object]) -> tuple[Reading, list[np.ndarray]]:
        """Return what the gateway reads, and the pictures that an engine gets; raise MediaRefused as it does."""
        file, into = os.open(path, os.O_RDONLY), os.memfd_create("frames")
        try:
            demuxer = type_of(file, "video").demuxer
            wanted = Wanted(sampling=sampling, max_bytes=self._max_bytes, size=SIZE)
            reading = await self.reader.read(file, demuxer=demuxer, wanted=wanted, into=into)
            return reading, _pictures(into)
        except ReadError as exc:
            raise refusal(exc, "video") from exc
        finally:
            os.close(file)
            os.close(into)

    async def _decoded(self, path: Path) -> Decoded | str:
        """Return a full decode of a file, or why there is none."""
        decoder = self._decoders.pop() if self._decoders else await _decoder()
        assert decoder.stdin is not None
        assert decoder.stdout is not None
        try:
            async with asyncio.timeout(self._seconds):
                decoder.stdin.write(f"{path}\n".encode())
                answer = json.loads(await decoder.stdout.readline())
        except TimeoutError:
            await _ended(decoder)
            return f"no full decode within {self._seconds:g} seconds"
        except (OSError, ValueError):
            await _ended(decoder)
            return "no full decode: it broke its process"
        self._decoders.append(decoder)
        return f"no full decode: {answer['error']}" if "error" in answer else Decoded(**answer)

    async def close(self) -> None:
        """End all processes."""
        self.reader.close()
        while self._decoders:
            await _ended(self._decoders.pop())


async def _decoder() -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    script = str(Path(__file__).with_name("full_decode.py"))
    return await asyncio.create_subprocess_exec(sys.executable, script, stdin=pipe, stdout=pipe, limit=ANSWER_BYTES)


async def _ended(process: asyncio.subprocess.Process) -> None:
    process.kill()
    await process.wait()


def _pictures(descriptor: int) -> list[np.ndarray]:
    header, begin = read_header(descriptor)
    return [_picture(descriptor, header, begin + place * header.frame_bytes) for place in range(header.frames)]


def _picture(descriptor: int, header: FramesHeader, at: int) -> np.ndarray:
    data = os.pread(descriptor, header.frame_bytes, at)
    return np.frombuffer(data, np.uint8).reshape(header.height, header.width, 3)


def summary(results: Sequence[Result]) -> str:
    """Return how many files were taken, refused and right."""
    counts = Counter(result.outcome for result in results)
    codes = Counter(result.code for result in results if result.outcome == REFUSED)
    refused = ", ".join(f"{code} {count}" for code, count in codes.most_common())
    return (
        f"{len(results)} files: {len(results) - counts[REFUSED]} taken, {counts[REFUSED]} refused"
        f"{f' ({refused})' if refused else ''}\n"
        f"taken: {counts[AGREE]} agree with a full decode, {counts[DISAGREE]} disagree, "
        f"{counts[NOT_COMPARED]} could not be compared"
    )


async def run(directory: Path, files: Sequence[Path], *, seconds: float, jobs: int) -> list[Result]:
    """Judge the files of a folder, and print a line for each that doesn't agree."""
    corpus = Corpus(seconds=seconds, jobs=jobs)

    async def judged(path: Path) -> Result:
        result = await corpus.judge(path)
        if result.outcome != AGREE:
            print(f"{path.relative_to(directory)}: {result.outcome}: {result.text}", flush=True)
        return result

    try:
        return await asyncio.gather(*(judged(path) for path in files))
    finally:
        await corpus.close()


def main() -> None:
    """Judge the files and sum up."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seconds", type=float, default=60, help="that a full decode of a file may last")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="files at a time")
    arguments = parser.parse_args()
    files = sorted(path for path in arguments.directory.rglob("*") if path.is_file() and path.stat().st_size)
    results = asyncio.run(run(arguments.directory, files, seconds=arguments.seconds, jobs=arguments.jobs))
    print(summary(results))
    sys.exit(any(result.outcome == DISAGREE for result in results))


if __name__ == "__main__":
    main()
