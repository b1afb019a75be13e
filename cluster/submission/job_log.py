"""The end of a job's log, and what is added to it: cut on the head, so that a log of gigabytes is never sent whole."""

import codecs
import threading
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from urllib.parse import urlencode

import requests

from isthmus.cluster.errors import ClusterError, last_line
from isthmus.cluster.submission.dashboard import ask

TAIL_LINES, TAIL_BYTES = 10_000, 8 << 20
TIMEOUT_SECONDS = 60
SILENCE_SECONDS = 2.5
"""Without a new line for this long, the job is asked whether it is over; the head looks at the file every second."""


def tail(url: str, job_id: str, node_id: str, num_lines: int) -> str:
    """Return the last lines of a job's log, at most 8 MiB.

    Raises:
        ClusterError: the head does not answer, or no longer has the log.
    """
    kept = bytearray()
    try:
        with _open(url, "file", job_id, node_id, num_lines, TIMEOUT_SECONDS) as answer:
            for part in answer.iter_content(1 << 20):
                kept += part
                del kept[: max(0, len(kept) - TAIL_BYTES)]
    except requests.RequestException as error:
        raise ClusterError(f"{url}: the log of {job_id} cannot be read: {last_line(error)}") from error
    return kept.decode(errors="replace")


def follow(url: str, job_id: str, node_id: str, num_lines: int, is_over: Callable[[], bool]) -> Iterator[str]:
    """Yield the last lines of a job's log and then each new one, until there is no more and `is_over` says so.

    Raises:
        ClusterError: the connection broke.
    """
    parts: SimpleQueue[bytes | Exception] = SimpleQueue()
    reader = threading.Thread(target=_read, args=(parts, url, job_id, node_id, num_lines), daemon=True)
    reader.start()
    decode, rest = codecs.getincrementaldecoder("utf-8")(errors="replace").decode, ""
    part: bytes | Exception | None
    part = _next(parts, TIMEOUT_SECONDS) or TimeoutError(f"no response within {TIMEOUT_SECONDS} s")
    over = False
    while part or not over:
        if isinstance(part, Exception):
            raise ClusterError(f"{url}: the log of {job_id} was interrupted: {last_line(part)}") from part
        *lines, rest = (rest + decode(part or b"")).split("\n")
        yield from lines
        over = over or (not part and is_over())  # what was written before the end comes within one more wait
        part = _next(parts, SILENCE_SECONDS)
    if rest:
        yield rest


def _next(parts: "SimpleQueue[bytes | Exception]", seconds: float) -> bytes | Exception | None:
    try:
        return parts.get(timeout=seconds)
    except Empty:
        return None


def _read(parts: "SimpleQueue[bytes | Exception]", url: str, job_id: str, node_id: str, num_lines: int) -> None:
    """Put what the head sends into a queue, and at last why nothing more comes; ends with the process at the latest."""
    try:
        with _open(url, "stream", job_id, node_id, num_lines, None) as answer:
            for part in answer.iter_content(None):
                parts.put(part)
        parts.put(ConnectionError("the head closed the connection"))
    except requests.RequestException as error:
        parts.put(error)


def _open(url: str, media: str, job_id: str, node_id: str, num_lines: int, timeout: float | None) -> requests.Response:
    query = {"submission_id": job_id, "node_id": node_id, "lines": num_lines, "timeout": TIMEOUT_SECONDS}
    answer = ask(f"{url}/api/v0/logs/{media}?{urlencode(query)}", stream=True, timeout=timeout)
    answer.raise_for_status()
    return answer
