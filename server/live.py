"""The configuration that is in use, and how a changed file comes into use while the gateway serves."""

import asyncio
import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from server.admission.auth import Caller, KeyRing, metrics_keys, tenant_keys
from server.aliases import Alias
from server.configuration import Configuration, content_of, parsed
from server.errors import ConfigurationError
from server.observe.metrics import NO_TENANT, Metrics

logger = logging.getLogger(__name__)

WATCH_SECONDS: Final = 1.0
DIGEST_DIGITS: Final = 12  # as many of `sha256sum` as a person compares

FileState = tuple[int, int, int, int] | None


@dataclass(frozen=True)
class Active:
    """A configuration, and what follows from it. All of it is replaced at once."""

    configuration: Configuration
    aliases: Mapping[str, Alias] | None
    tenants: KeyRing[Caller] | None
    metrics: KeyRing[None] | None
    digest: str
    """The first digits of the file's SHA-256. Empty without a file."""

    @classmethod
    def of(cls, configuration: Configuration, digest: str = "") -> "Active":
        """Return what follows from a configuration."""
        return cls(
            configuration, configuration.aliases, tenant_keys(configuration), metrics_keys(configuration), digest
        )


class LiveConfiguration:
    """Holds the active configuration. A new one becomes active as a whole or, if anything is wrong, not at all."""

    def __init__(
        self,
        path: Path | None,
        *,
        accept: Callable[[Configuration], None],
        warn: Callable[[Configuration], None],
        metrics: Metrics,
        asked: asyncio.Event | None = None,
    ) -> None:
        """Read the file at `path`; without one, everything keeps its default.

        `accept` raises ConfigurationError for a configuration that this gateway must not have, and `warn` logs what is
        doubtful in one. Setting `asked` has the file read again. Raises ConfigurationError if the file is missing or
        wrong.
        """
        self._path = path
        self._accept = accept
        self._warn = warn
        self._metrics = metrics
        self._asked = asked or asyncio.Event()
        self._state = self._seen()
        self._use(self._read())

    @property
    def active(self) -> Active:
        """The configuration in use. A request that has begun may have seen an earlier one."""
        return self._active

    def warn(self) -> None:
        """Log what is doubtful in the configuration in use."""
        self._warn(self._active.configuration)

    async def watch(self) -> None:
        """Use the file's new content whenever it changes or is asked for, until cancelled."""
        if self._path is None:
            await asyncio.Event().wait()
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._asked.wait(), WATCH_SECONDS)
            if self._asked.is_set():
                self._asked.clear()
                logger.info("reading the configuration again, as asked", extra={"path": str(self._path)})
                await self._reload()
            elif self._seen() != self._state:
                await self._reload_when_written()

    async def _reload_when_written(self) -> None:
        """Wait until a file stays as it is: one that is being written may already make sense, and not what is meant."""
        state = self._seen()
        while True:
            await asyncio.sleep(WATCH_SECONDS / 2)
            if (now := self._seen()) == state:
                break
            state = now
        await self._reload()

    async def _reload(self) -> None:
        self._state = self._seen()
        try:
            found = await asyncio.to_thread(self._read)
        except ConfigurationError as exc:
            self._metrics.config_accepted.set(0)
            logger.error("the configuration is refused, the last one stays in use:\n%s", exc)
            return
        before = self._active
        self._use(found)
        if found.digest != before.digest:
            logger.info("a new configuration is in use: %s", _difference(before, found), extra={"sha256": found.digest})
            self.warn()

    def _read(self) -> Active:
        if self._path is None:
            found = Active.of(Configuration())
        else:
            content = content_of(self._path)
            digest = hashlib.sha256(content).hexdigest()[:DIGEST_DIGITS]
            found = Active.of(parsed(content, self._path), digest)
        self._accept(found.configuration)
        return found

    def _use(self, found: Active) -> None:
        self._active = found
        metrics = self._metrics
        metrics.config_accepted.set(1)
        metrics.config_loaded_at.set(time.time())
        metrics.config_info.clear()
        metrics.config_info.labels(found.digest or "none").set(1)
        metrics.know_tenants(found.configuration.tenants or (NO_TENANT,))
        metrics.retention_limit.clear()
        for name, alias in (found.aliases or {}).items():
            metrics.retention_limit.labels(name).set(alias.max_retention)

    def _seen(self) -> FileState:
        """Return what changes when the file does, or a link that leads to it; None if it is gone."""
        if self._path is None:
            return None
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _difference(before: Active, now: Active) -> str:
    """Return which models and tenants came, went or changed."""
    told = []
    for kind in ("models", "tenants"):
        old = getattr(before.configuration, kind) or {}
        new = getattr(now.configuration, kind) or {}
        changed = [name for name in new if name in old and new[name] != old[name]]
        for what, names in (("new", new.keys() - old), ("gone", old.keys() - new), ("changed", changed)):
            if names:
                told.append(f"{kind} {what}: {', '.join(sorted(names))}")
    told += [
        f"{kind} changed"
        for kind in ("limits", "metrics_keys")
        if getattr(before.configuration, kind) != getattr(now.configuration, kind)
    ]
    return "; ".join(told) or "nothing in it means anything else"
