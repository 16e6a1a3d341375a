"""The process that reads media.

Once it is ready it says so with an empty line. It reads jobs from the socket on its standard input, each a line of JSON
with the descriptors of the files attached, and answers each with a line of JSON.
"""

import errno
import json
import math
import os
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from server.reader.audio import read_audio
from server.reader.facts import Facts, Limits, ReadError
from server.reader.frames_file import PAGE_BYTES
from server.reader.images import read_image
from server.reader.reading import read_video, scan_video
from server.reader.wanted import Wanted

MEMORY_BYTES = 2 * 2**30  # address space, of which the libraries take a third
MESSAGE_BYTES = 64 * 1024
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
MAX_HEADER_BYTES = 256 * PAGE_BYTES  # of a frames file


def _facts(descriptor: int, kind: str, demuxer: str, limits: Limits) -> Facts:
    if kind == "image":
        return read_image(descriptor)
    if kind == "audio":
        return read_audio(descriptor, demuxer, limits)
    return scan_video(descriptor, demuxer, limits).facts


def _result(job: dict[str, Any], descriptors: Sequence[int]) -> dict[str, Any]:
    limits = Limits(**job["limits"])
    if job["wanted"] is None:
        return asdict(_facts(descriptors[0], job["kind"], job["demuxer"], limits))
    wanted = Wanted(**job["wanted"])
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (min(wanted.max_bytes + MAX_HEADER_BYTES, most), most))
    try:
        reading = read_video(descriptors[0], job["demuxer"], limits, wanted, descriptors[1], threads=job["threads"])
        return asdict(reading)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, most))


def _answer(job: dict[str, Any], descriptors: Sequence[int]) -> dict[str, Any]:
    kind = job["kind"]
    try:
        return _result(job, descriptors)
    except ReadError as exc:
        return {"error": str(exc), "code": exc.code}
    except (MemoryError, OverflowError):
        return {"error": f"the {kind} could not be read within the limits", "code": None}
    except OSError as exc:
        if exc.errno in _NO_ROOM:
            return {"error": f"there is no room for the {kind}'s frames", "code": "no_room"}
        return {"error": f"the {kind} is truncated or broken", "code": None}
    except Exception:  # libav's and Pillow's errors, and what a damaged file makes of their bindings
        return {"error": f"the {kind} is truncated or broken", "code": None}
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def main(seconds: int, max_bytes: int) -> None:
    """Answer jobs until the gateway is gone. Each thread of a job may take so much of a core's time."""
    import av
    from PIL import Image

    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it is the gateway's to take, or a closing terminal's
    av.logging.set_level(None)
    Image.MAX_IMAGE_PIXELS = None  # Pillow would warn; the limit here is the reader's
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, max_bytes + MAX_HEADER_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with socket.socket(fileno=0) as jobs:
        jobs.sendall(b"\n")  # ready
        while True:
            line, descriptors, _, _ = socket.recv_fds(jobs, MESSAGE_BYTES, 2)
            if not line or not descriptors:
                return
            usage = resource.getrusage(resource.RUSAGE_SELF)
            spent = math.ceil(usage.ru_utime + usage.ru_stime)
            job = json.loads(line)
            cpu_seconds = seconds * job["threads"]
            resource.setrlimit(resource.RLIMIT_CPU, (spent + cpu_seconds, resource.RLIM_INFINITY))
            jobs.sendall(json.dumps(_answer(job, descriptors)).encode() + b"\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
