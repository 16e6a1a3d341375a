"""Log records as JSON lines. A line says what happened to which request, and never holds a body, a message or a key."""

import logging
import sys
import time
import traceback
from functools import lru_cache
from typing import TextIO

import msgspec

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "color_message", "taskName"}


class JSONLines(logging.Formatter):
    """Formats a log record as one line with a JSON object. The keys of `extra` become fields of the object."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON.

        Of an exception, only the type and the stack frames are logged, because its message may quote a request.
        """
        line: dict[str, object] = {
            "time": f"{_second(int(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        line.update({key: value for key, value in record.__dict__.items() if key not in _STANDARD})
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = record.exc_info[0].__name__
            line["frames"] = [
                f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(record.exc_info[2])
            ]
        return msgspec.json.encode(line, enc_hook=str).decode()


@lru_cache(maxsize=8)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def configure(level: str, stream: TextIO | None = None) -> None:
    """Write the log records of the gateway and of uvicorn to `stream`, by default stdout, as JSON lines."""
    # No line says these; logging's documentation advises to switch them off like this.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    handler = logging.StreamHandler(sys.stdout if stream is None else stream)
    handler.setFormatter(JSONLines())
    for name in ("server", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level.upper())
    logging.getLogger("asyncio").handlers = [handler]
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # its warnings quote what clients send
