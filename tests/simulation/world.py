"""Processes, threads and clocks under one seeded scheduler, in one real thread.

Each simulated thread is a greenlet, so the product's synchronous code can be interrupted wherever it waits: at a
request, a sleep or a join. The scheduler takes the earliest waiter, of equals a random one. What the product imports as
`time`, `threading`, `uuid` and `datetime` is replaced by the classes at the end of this file (see `environment`).
"""

import heapq
import random
from collections.abc import Callable, Sequence
from datetime import datetime, tzinfo
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from greenlet import getcurrent, greenlet

EPOCH = 1_700_000_000.0
TIME_LIMIT = 4 * 3600.0
WAITS_LIMIT = 100_000
"""Simulated seconds, and waits of all threads, after which a schedule that has not ended is said to hang."""


class Killed(BaseException):
    """The process of this thread is dead: nothing that it still does has an effect."""


class Violation(AssertionError):
    """A promise was broken."""


class Process:
    """A simulated operating system process.

    Args:
        world: Where it lives.
        name: Unique.
        role: What faults address: driver, rank, uploader, exporter or reader.
        main: Its main thread; the process ends with it.
        parent: Ends this process when it ends.
        node: Machine on which it runs.
    """

    def __init__(
        self,
        world: "World",
        name: str,
        role: str,
        main: Callable[[], Any],
        parent: "Process | None" = None,
        node: str = "",
    ) -> None:
        self.world, self.name, self.role, self.node = world, name, role, node
        self.alive, self.resume_at, self.clock_offset = True, 0.0, 0.0
        self.threads: list[Thread] = []
        self.children: list[Process] = []
        self.result: Any = None
        self.error: BaseException | None = None
        self.ended = SimEvent()
        self.group: Any = None
        world.processes.append(self)
        if parent is not None:
            parent.children.append(self)
        Thread(self, lambda: self._run(main), "main").start()

    def kill(self) -> None:
        """End it at once, without any of its cleaning up, and its children."""
        if self.alive:
            self.alive = False
            self.ended.set()
            self.world.dying.append(self)
            for child in self.children:
                child.kill()

    def pause(self, seconds: float) -> None:
        """Stop all its threads for some time, as SIGSTOP or a frozen machine does."""
        self.resume_at = max(self.resume_at, self.world.now + seconds)

    def _run(self, main: Callable[[], Any]) -> None:
        try:
            self.result = main()
        except Killed:
            raise
        except Exception as error:  # noqa: BLE001 - whoever started the process judges how it ended
            self.error = error
        self.kill()


class Thread:
    """A simulated thread, with the interface of threading.Thread that the product uses."""

    def __init__(self, process: Process, target: Callable[[], Any], name: str) -> None:
        self.process, self.name, self.wake, self.is_done = process, name, 0, False
        self.listed_at = -1.0
        """When the store last listed something for it."""
        self.has_grad = True
        """Whether torch records gradients, which each thread decides for itself."""
        self.greenlet = greenlet(self._main, process.world.hub)
        self._target, self._joining = target, SimEvent()

    def start(self) -> None:
        self.process.threads.append(self)
        self.process.world.wake(self)

    def is_alive(self) -> bool:
        return not self.is_done and self.process.alive

    def join(self, timeout: float | None = None) -> None:
        self._joining.wait(timeout)

    def _main(self) -> None:
        try:
            if self.process.alive:
                self._target()
        except Killed:
            pass
        except Exception as error:  # noqa: BLE001 - nothing in the product may end a thread like this
            self.process.world.failure = self.process.world.failure or error
        finally:
            self.is_done = True
            self._joining.set()


class World:
    """Time, processes and the faults of one schedule.

    Args:
        seed: Of all that is random.
        on_turn: Called with the process whose turn it is, before each wait.
    """

    def __init__(self, seed: int, on_turn: Callable[[Process], None]) -> None:
        global _world  # noqa: PLW0603 - the product's modules have one clock
        _world = self
        self.random = random.Random(seed)
        self.now, self.num_waits = 0.0, 0
        self.processes: list[Process] = []
        self.dying: list[Process] = []
        self.failure: Exception | None = None
        self.thread: Thread | None = None
        self.hub = getcurrent()
        self._on_turn = on_turn
        self._queue: list[tuple[float, float, int, Thread | None, Callable[[], Any] | None]] = []

    @property
    def process(self) -> Process:
        """The process whose code runs now."""
        assert self.thread is not None
        return self.thread.process

    def start(
        self, name: str, role: str, main: Callable[[], Any], parent: Process | None = None, node: str = ""
    ) -> Process:
        """Start a process."""
        return Process(self, name, role, main, parent, node)

    def at(self, seconds: float, action: Callable[[], Any]) -> None:
        """Do something of nobody's in so many seconds."""
        heapq.heappush(self._queue, (self.now + seconds, self.random.random(), 0, None, action))

    def wake(self, thread: Thread, seconds: float = 0.0) -> None:
        """Let a thread go on in so many seconds, and not before, unless it is woken again."""
        thread.wake += 1
        heapq.heappush(self._queue, (self.now + seconds, self.random.random(), thread.wake, thread, None))

    def wait(self, seconds: float) -> None:
        """Let the others run until this thread is woken, which happens at the latest after so many seconds."""
        thread = self.thread
        assert thread is not None
        self.num_waits += 1
        if thread.process.alive:
            self._on_turn(thread.process)
        if not thread.process.alive:
            raise Killed
        self.wake(thread, seconds)
        self.hub.switch()
        if not thread.process.alive:
            raise Killed

    def run(self, last: Process) -> None:
        """Run until a process has ended.

        Raises:
            Violation: that takes too long, or a thread ended with an exception.
        """
        while last.alive:
            when, _, wake, thread, action = heapq.heappop(self._queue)
            if thread is not None and (thread.wake != wake or thread.is_done):
                continue
            if thread is not None and thread.process.alive and thread.process.resume_at > when:
                heapq.heappush(self._queue, (thread.process.resume_at, self.random.random(), wake, thread, None))
                continue
            self.now = max(self.now, when)
            if self.now > TIME_LIMIT or self.num_waits > WAITS_LIMIT:
                raise Violation(f"hangs: {', '.join(f'{p.name} {[t.name for t in p.threads]}' for p in self.living())}")
            self._switch(thread, action)
            if self.failure is not None:
                raise Violation(f"{type(self.failure).__name__}: {self.failure}") from self.failure

    def living(self) -> list[Process]:
        """Return the processes that have not ended."""
        return [process for process in self.processes if process.alive]

    def close(self) -> None:
        """End all processes."""
        for process in self.processes:
            process.kill()
        self._bury()

    def _switch(self, thread: Thread | None, action: Callable[[], Any] | None) -> None:
        self.thread = thread
        if action is not None:
            action()
        elif thread is not None:
            self._resume(thread, thread.greenlet.switch)
        self._bury()

    def _resume(self, thread: Thread, switch: Callable[[], Any]) -> None:
        with torch.set_grad_enabled(thread.has_grad):
            switch()
            thread.has_grad = torch.is_grad_enabled()

    def _bury(self) -> None:
        """Unwind the threads of processes that died; whatever they do on the way, they are dead."""
        while self.dying:
            for thread in self.dying.pop().threads:
                if not thread.is_done:
                    self.thread = thread
                    started = bool(thread.greenlet)
                    self._resume(thread, partial(thread.greenlet.throw, Killed) if started else thread.greenlet.switch)
        self.thread = None


_world: World


def world() -> World:
    """Return the world of the schedule that runs now."""
    return _world


class SimEvent:
    """threading.Event."""

    def __init__(self) -> None:
        self._is_set = False
        self._waiting: list[Thread] = []

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        for thread in self._waiting:
            _world.wake(thread)
        self._waiting.clear()

    def clear(self) -> None:
        self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        if not self._is_set:
            thread = _world.thread
            assert thread is not None
            self._waiting.append(thread)
            _world.wait(2 * TIME_LIMIT if timeout is None else max(0.0, timeout))
            if thread in self._waiting:
                self._waiting.remove(thread)
        return self._is_set


def _thread(
    target: Callable[..., Any], args: Sequence[Any] = (), name: str = "thread", *, daemon: bool = True
) -> Thread:
    assert daemon, "a thread that is no daemon would outlive its process's main thread"
    return Thread(_world.process, lambda: target(*args), name)


class _Lock:
    """threading.Lock; between two waits a thread is alone anyway, and the product holds no lock while it waits."""

    def __enter__(self) -> None:
        self._waits = _world.num_waits

    def __exit__(self, kind: Any, *_: Any) -> None:
        assert kind or self._waits == _world.num_waits, "a lock was held while its thread waited"


class SimDatetime:
    """datetime.datetime, by the wall clock of the process."""

    @staticmethod
    def now(zone: tzinfo) -> datetime:
        return datetime.fromtimestamp(wall_clock(), zone)

    fromisoformat = staticmethod(datetime.fromisoformat)


def wall_clock() -> float:
    """Return Unix time as this process sees it."""
    offset = 0.0 if _world.thread is None else _world.thread.process.clock_offset
    return EPOCH + _world.now + offset


def _uuid() -> Any:
    return SimpleNamespace(hex=f"{_world.random.getrandbits(128):032x}")


def _sleep(seconds: float) -> None:
    _world.wait(seconds)


TIME = SimpleNamespace(monotonic=lambda: _world.now, time=wall_clock, sleep=_sleep)
THREADING = SimpleNamespace(Thread=_thread, Event=SimEvent, Lock=_Lock)
UUID = SimpleNamespace(uuid4=_uuid)
