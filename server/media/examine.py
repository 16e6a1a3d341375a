"""What a medium is: identified by its first bytes, then looked into by the probe."""

import os
from dataclasses import dataclass

from server.errors import MediaRefused
from server.media.facts import Facts, ProbeError
from server.media.identify import HEAD_BYTES, FileType, identify
from server.media.part import Kind
from server.media.probe import Prober
from server.observe.metrics import Metrics

REMEMBERED_FACTS = 4096
_INVALID: dict[Kind, str] = {"video": "invalid_video", "image": "invalid_image", "audio": "invalid_audio"}


@dataclass(frozen=True)
class Examined:
    """A medium's type, and what it holds."""

    type: FileType
    facts: Facts


class Examiner:
    """Examines media, and remembers what it found about the last ones."""

    def __init__(self, prober: Prober, *, metrics: Metrics) -> None:
        """Remember nothing yet."""
        self._prober = prober
        self._probes = metrics.probes
        self._facts: dict[tuple[Kind, str], Facts] = {}

    async def examine(
        self, descriptor: int, *, kind: Kind, digest: str | None = None, subject: str = "data"
    ) -> Examined:
        """Return what is in the open file `descriptor`, which is at its begin.

        Content that was seen before under the same `digest`, its SHA-256, is not probed again: conversations are often
        about one video. Raises MediaRefused, which speaks of the `subject`, if it is no medium of that kind.
        """
        found = identify(os.pread(descriptor, HEAD_BYTES, 0), kind)
        if found is None:
            article = "a" if kind == "video" else "an"
            raise MediaRefused(f"the {subject} is not {article} {kind} of a kind this gateway takes")
        facts = None if digest is None else self._facts.get((kind, digest))
        if facts is None:
            facts = await self._probe(descriptor, kind, found)
            if digest is not None:
                self._remember(kind, digest, facts)
        return Examined(found, facts)

    async def _probe(self, descriptor: int, kind: Kind, found: FileType) -> Facts:
        self._probes.inc()
        try:
            return await self._prober.probe(descriptor, kind=kind, demuxer=found.demuxer)
        except ProbeError as exc:
            raise MediaRefused(str(exc), code=exc.code or _INVALID[kind]) from exc

    def _remember(self, kind: Kind, digest: str, facts: Facts) -> None:
        self._facts[kind, digest] = facts
        if len(self._facts) > REMEMBERED_FACTS:
            del self._facts[next(iter(self._facts))]
