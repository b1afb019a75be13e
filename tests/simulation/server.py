"""The server of the simulated object store, and the network before it.

A request is applied whole, later or not at all, and its answer may be lost.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from tests.simulation.world import Process, Thread, World

T = TypeVar("T")
Observer = Callable[[str, "Stored | None", "Stored | None", "Thread | None"], None]
SLOW = 0.98
"""Share of the requests that take a tenth of a second at most; the others take up to five."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One version of an object."""

    data: bytes
    etag: str
    put_at: float
    mark: str = ""
    """Metadata of a multipart upload."""


class Missing(Exception):
    """The server has no such object or upload."""


class ConditionFailed(Exception):
    """The server's object is not as the condition of a request says."""


@dataclass
class Bucket:
    """The server's state; each method is one atomic request, applied at the world's present time."""

    world: World
    observe: Observer
    objects: dict[str, Stored] = field(default_factory=dict)
    uploads: dict[str, tuple[str, str, dict[int, bytes]]] = field(default_factory=dict)
    """URL, mark and parts of unfinished multipart uploads, by their id."""
    log: list[tuple[float, str, Stored | None]] = field(default_factory=list)
    """Every change, for listings from the past."""

    def read(self, url: str) -> Stored:
        found = self.objects.get(url)
        if found is None:
            raise Missing
        return found

    def write(self, url: str, data: bytes, condition: str | None = None, mark: str = "") -> Stored:
        """Put an object; condition: "*": only where there is none; else only over this ETag."""
        there = self.objects.get(url)
        if condition == "*" and there is not None:
            raise ConditionFailed
        if condition not in (None, "*") and (there is None or there.etag != condition):
            raise ConditionFailed if there else Missing
        etag = hashlib.md5(data, usedforsecurity=False).hexdigest()
        self._change(url, Stored(data, etag, self.world.now, mark))
        return self.objects[url]

    def delete(self, url: str) -> None:
        if url in self.objects:
            self._change(url, None)

    def listing(self, prefix: str, age: float = 0.0) -> list[tuple[str, Stored]]:
        """Return the objects below a prefix as they are, or as they were `age` seconds ago."""
        objects = self.objects
        if age:
            objects = {}
            for when, url, stored in self.log:
                if when <= self.world.now - age:
                    objects.pop(url, None)
                    if stored is not None:
                        objects[url] = stored
        elif self.world.thread is not None:
            self.world.thread.listed_at = self.world.now
        return sorted((url, stored) for url, stored in objects.items() if url.startswith(prefix))

    def create_upload(self, url: str, mark: str) -> str:
        name = f"upload-{len(self.log)}-{self.world.random.getrandbits(32):x}"
        self.uploads[name] = (url, mark, {})
        return name

    def put_part(self, name: str, number: int, data: bytes) -> None:
        if name not in self.uploads:
            raise Missing
        self.uploads[name][2][number] = data

    def complete_upload(self, name: str) -> Stored:
        if name not in self.uploads:
            raise Missing
        url, mark, parts = self.uploads.pop(name)
        return self.write(url, b"".join(data for _, data in sorted(parts.items())), None, mark)

    def _change(self, url: str, new: Stored | None) -> None:
        old = self.objects.pop(url, None)
        if new is not None:
            self.objects[url] = new
        self.log.append((self.world.now, url, new))
        self.observe(url, old, new, self.world.thread)


@dataclass
class Trouble:
    """What goes wrong with one request."""

    kind: str
    """refuse, lose, delay, duplicate or stale_list."""
    seconds: float = 0.0


class Refused(Exception):
    """The server did not apply the request, or its answer was lost: the client cannot tell which."""


class TimedOut(Refused):
    """There was no answer within the client's limit; the request may still be applied."""


@dataclass
class Network:
    """Carries requests to the server, in the worst case late, twice or not at all."""

    world: World
    bucket: Bucket
    trouble: Callable[[str, Process, bool], Trouble | None]
    """What goes wrong with the next request."""

    def request(self, url: str, apply: Callable[[], T], limit: float, *, is_write: bool = False) -> T:
        """Return the server's answer.

        Raises:
            Refused: there was none.
        """
        trouble = self._travel(url, is_write=is_write)
        if trouble is not None and trouble.kind != "stale_list":
            return self._troubled(trouble, apply, limit, is_write=is_write)
        answer = apply()
        if is_write and self.world.random.random() < 0.25:
            self.world.wait(0.2 * self.world.random.random())
        return answer

    def list(self, prefix: str, limit: float) -> "list[tuple[str, Stored]]":
        """Return a listing, which may be from the past."""
        trouble = self._travel(prefix, is_write=False)
        if trouble is None or trouble.kind == "stale_list":
            return self.bucket.listing(prefix, trouble.seconds if trouble else 0.0)
        return self._troubled(trouble, lambda: self.bucket.listing(prefix), limit, is_write=False)

    def _travel(self, url: str, *, is_write: bool) -> Trouble | None:
        """Let a request travel to the server; return what goes wrong with it there."""
        chance = self.world.random.random()
        self.world.wait(0.01 + 0.1 * chance if chance < SLOW else 5.0 * (chance - SLOW) / (1 - SLOW))
        process = self.world.process
        trouble = self.trouble(url, process, is_write)
        if not process.alive or process.resume_at > self.world.now:
            self.world.wait(0.0)  # it is dead, or stopped before the request left
        return trouble

    def _troubled(self, trouble: Trouble, apply: Callable[[], T], limit: float, *, is_write: bool) -> T:
        def once_more() -> None:
            try:
                apply()
            except (Missing, ConditionFailed):
                return

        if trouble.kind == "refuse":
            raise Refused
        if trouble.kind == "delay":
            self.world.wait(min(trouble.seconds, limit))
            if trouble.seconds > limit:
                if is_write:
                    self.world.at(trouble.seconds - limit, once_more)
                raise TimedOut
        answer = apply()
        if trouble.kind == "duplicate" and is_write:
            self.world.at(trouble.seconds, once_more)
        if trouble.kind == "lose":
            raise Refused
        return answer
