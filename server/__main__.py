"""`python -m server`: runs the gateway under uvicorn, with one worker."""

import asyncio
import importlib.util
import logging
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from server.admission.drain import Drain
from server.app import create_app
from server.edge.head_limits import bounded_http
from server.errors import ConfigurationError
from server.observe import logs
from server.settings import Settings, traces_are_exported

if TYPE_CHECKING:
    from server.observe.tracing import Tracing

logger = logging.getLogger("server")

BAD_SETTINGS = 2
LAST_WORDS_SECONDS = 2  # after the drain, so that interrupted streams can still send their closing event
KEEPALIVE_SECONDS = 75  # longer than the keep-alive time of clients, so that the client closes an idle connection first


class DrainingServer(uvicorn.Server):
    """A uvicorn server that keeps listening while it drains.

    Health probes and new requests then get an answer that says so; uvicorn alone would close its sockets at once.
    """

    def __init__(self, config: uvicorn.Config, drain: Drain) -> None:
        """Serve `config`, and stop when `drain` has finished."""
        super().__init__(config)
        self._drain = drain

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start draining on the first signal; stop at once on the second."""
        if self._drain.has_begun:
            super().handle_exit(sig, frame)
        else:
            logger.info("draining")
            self._drain.begin()

    async def on_tick(self, counter: int) -> bool:
        """Return whether the server should stop."""
        if self._drain.finished():
            self.should_exit = True
        return await super().on_tick(counter)


def _tracing() -> "Tracing | None":
    if not traces_are_exported():
        return None
    try:
        from server.observe import tracing
    except ImportError as exc:
        raise ConfigurationError(
            "OTEL_EXPORTER_OTLP_ENDPOINT is set, but OpenTelemetry is not installed (extra: otel)"
        ) from exc
    return tracing.Tracing.over_otlp()


def main() -> int:
    """Run the gateway until a signal stops it, and return the exit code."""
    try:
        settings = Settings.from_environment()
        drain = Drain(settings.drain_seconds)
        reload = asyncio.Event()
        app = create_app(settings, drain=drain, reload=reload, tracing=_tracing())
    except ConfigurationError as exc:
        sys.stderr.write(f"The gateway can't start:\n{exc}\n")
        return BAD_SETTINGS
    logs.configure(settings.log_level)
    signal.signal(signal.SIGHUP, lambda *_: reload.set())  # the loop wakes up at least every `on_tick`
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="uvloop" if importlib.util.find_spec("uvloop") else "asyncio",
        http=bounded_http(head_seconds=settings.body_seconds),
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEPALIVE_SECONDS,
        timeout_graceful_shutdown=LAST_WORDS_SECONDS,
    )
    server = DrainingServer(config, drain)
    server.run()
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main())
