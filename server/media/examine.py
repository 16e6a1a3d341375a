"""Examines media: identifies the type by the first bytes, then has the reader look into the content."""

import os
from dataclasses import dataclass

from server.errors import GatewayError, MediaRefused, Overloaded
from server.media.identify import HEAD_BYTES, TAKEN_AUDIO, TAKEN_IMAGES, TAKEN_VIDEOS, FileType, identify, name_of
from server.media.part import Kind
from server.media.readers import Reader
from server.observe.metrics import Metrics
from server.reader.facts import Facts, ReadError

REMEMBERED_FACTS = 4096
NO_ROOM = "no_room"
UPLOAD = "file"  # what an uploaded file is called in errors
WITH_ARTICLE: dict[Kind, str] = {"video": "a video", "image": "an image", "audio": "an audio clip"}
_TAKEN: dict[Kind, str] = {"video": TAKEN_VIDEOS, "image": TAKEN_IMAGES, "audio": TAKEN_AUDIO}
_NEXT_STEPS = {
    "a picture (image/": "send pictures in image_url parts",
    "a video": "send videos in video_url parts",
    "an audio clip": "send audio clips in audio_url parts",
    "a playlist": "send the medium that it names",
    "a web page": "the URL must lead to the file itself",
}
"""What to do about media that are sent as something else."""
_INVALID: dict[Kind, str] = {"video": "invalid_video", "image": "invalid_image", "audio": "invalid_audio"}


@dataclass(frozen=True)
class Examined:
    """The type of a medium, and the facts about its content."""

    type: FileType
    facts: Facts


class Examiner:
    """Examines media, and caches the facts about the REMEMBERED_FACTS media that were examined last."""

    def __init__(self, reader: Reader, *, metrics: Metrics) -> None:
        """Start with an empty cache."""
        self._reader = reader
        self._probes = metrics.probes
        self._facts: dict[tuple[Kind, str], Facts] = {}

    async def examine(
        self, descriptor: int, *, kind: Kind, digest: str | None = None, subject: str = "data"
    ) -> Examined:
        """Return the type and the facts of the medium in the open file `descriptor`, whose offset is 0.

        `digest` is the SHA-256 of the content. Content with a known digest is not read again, because the requests
        of a conversation are often about the same video.
        Raises MediaRefused, whose message names the `subject`, if the content is not a readable medium of this kind.
        """
        found = type_of(descriptor, kind, subject=subject)
        facts = None if digest is None else self._facts.get((kind, digest))
        if facts is None:
            facts = await self._probe(descriptor, kind, found)
            if digest is not None:
                self._remember(kind, digest, facts)
        return Examined(found, facts)

    async def _probe(self, descriptor: int, kind: Kind, found: FileType) -> Facts:
        self._probes.inc()
        try:
            return await self._reader.examine(descriptor, kind=kind, demuxer=found.demuxer)
        except ReadError as exc:
            raise refusal(exc, kind) from exc

    def _remember(self, kind: Kind, digest: str, facts: Facts) -> None:
        self._facts[kind, digest] = facts
        if len(self._facts) > REMEMBERED_FACTS:
            del self._facts[next(iter(self._facts))]


def type_of(descriptor: int, kind: Kind, *, subject: str = "data", label: str = "") -> FileType:
    """Return the type of an open file, by its first bytes; raise MediaRefused if it is no type of this kind.

    The message calls the file `subject`. `label` is the type that its sender claims, if there is one.
    """
    head = os.pread(descriptor, HEAD_BYTES, 0)
    found = identify(head, kind)
    if found is None:
        raise MediaRefused(_complaint(head, kind, subject, label))
    return found


def _complaint(head: bytes, kind: Kind, subject: str, label: str) -> str:
    if not head:
        return f"the {subject} is empty"
    name = name_of(head)
    accepted = f"{WITH_ARTICLE[kind]} of a type that this gateway accepts ({_TAKEN[kind]})"
    if name is None:
        return f"the {subject} is not {accepted}"
    claim = f", although its data URL says {label}" if label and label.partition("/")[0] not in name else ""
    steps = [step for noun, step in _NEXT_STEPS.items() if name.startswith(noun) and kind not in noun]
    return f"the {subject} is {name}{claim}, not {accepted}{f': {steps[0]}' if steps and subject != UPLOAD else ''}"


def refusal(exc: ReadError, kind: Kind) -> GatewayError:
    """Return what a client is told about a medium that could not be read."""
    if exc.code == NO_ROOM:
        return Overloaded("the store for videos is full, try again later")
    return MediaRefused(str(exc), code=exc.code or _INVALID[kind])
