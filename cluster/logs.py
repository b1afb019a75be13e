"""Structured logs: one JSON object per line with time, level, message and context: run, stage, step, rank."""

import fcntl
import json
import logging
import os
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

FORMAT_VARIABLE, PLAIN = "ISTHMUS_LOGS", "plain"

QUIET = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
"""Environment of a run's processes: no progress bars or reports of libraries in a log."""

_context: dict[str, Any] = {}
"""Replaced, never changed: other threads format records meanwhile."""


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON; a traceback becomes the key `traceback`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the JSON line of a record."""
        line: dict[str, Any] = {
            "time": _timestamp(record.created),
            "level": record.levelname.lower(),
            **_context,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def bind_context(**values: Any) -> None:
    """Add to the context that every later line of this process carries; a value of None removes its key."""
    global _context  # noqa: PLW0603 - one context per process, replaced in one assignment
    _context = {key: value for key, value in (_context | values).items() if value is not None}


class PlainFormatter(JsonFormatter):
    """Formats a record as one readable line, for a person at a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, with the traceback below it, if there is one."""
        return render_line(json.loads(super().format(record)))


def configure_logging(stream: TextIO | None = None, level: int = logging.INFO, **context: Any) -> None:
    """Send every log record of this process as JSON lines to `stream` (stderr), replacing other root handlers.

    With ISTHMUS_LOGS=plain in the environment the lines are plain text.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(PlainFormatter() if os.environ.get(FORMAT_VARIABLE) == PLAIN else JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for noisy in ("urllib3", "botocore", "filelock", "DeepSpeed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    bind_context(**context)


@contextmanager
def bounded_file(descriptor: int, max_bytes: int, check_seconds: float = 30.0) -> Iterator[None]:
    """Keep the file that a descriptor writes to below a size: its older half is dropped when it has grown past that.

    Whoever else writes through the same open file, such as Ray with the lines of all workers, is covered too.
    Anything but a regular file is left alone.
    """
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        yield
        return
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_APPEND)  # so that writers follow when it is cut
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(check_seconds):
            drop_older_half(descriptor, max_bytes)

    thread = threading.Thread(target=watch, name="log size", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def drop_older_half(descriptor: int, max_bytes: int) -> None:
    """Cut a file that is larger than `max_bytes` to its newest whole lines, half as many bytes at most."""
    size = os.fstat(descriptor).st_size
    if size <= max_bytes:
        return
    with Path(f"/proc/self/fd/{descriptor}").open("rb") as file:
        file.seek(size - max_bytes // 2)
        newest = file.read().partition(b"\n")[2]
    os.ftruncate(descriptor, 0)
    os.write(descriptor, newest)


def parse_line(text: str) -> dict[str, Any] | None:
    """Return the JSON object at the end of a log line (after Ray's actor name); None if it is plain text."""
    start = text.find('{"time"')
    if start < 0:
        return None
    try:
        line = json.loads(text[start:])
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def render_line(line: dict[str, Any]) -> str:
    """Return a structured line as a person reads it: `12:00:01 stage1 120 r0 message`."""
    place = " ".join(
        f"{prefix}{line[key]}" for key, prefix in (("stage", ""), ("step", ""), ("rank", "rank ")) if key in line
    )
    level = "" if line.get("level") == "info" else f"{str(line.get('level', '')).upper()} "
    text = f"{str(line.get('time', ''))[11:19]} {place}{' ' if place else ''}{level}{line.get('message', '')}"
    return text + (f"\n{line['traceback']}" if "traceback" in line else "")


def _timestamp(seconds: float) -> str:
    milliseconds = int(seconds * 1000) % 1000
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{milliseconds:03d}Z"
