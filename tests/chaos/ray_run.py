"""A run under Ray: the product's driver on a cluster of raylets, disturbed from outside and started again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from isthmus.cluster.ray_nodes.drain import drain_node
from isthmus.cluster.status import read_status
from isthmus.trainer.config.loading import to_yaml
from tests.chaos.faults import START_FILE
from tests.chaos.pipeline import ROOT, Attempt, Run
from tests.chaos.schedule import Fault
from tests.integration.cluster.raylets import Raylets

NODES, CPUS_PER_NODE = 2, 4
"""Either node alone has room for two ranks and two readers."""
NOTICE_SECONDS = 5.0
DRIVER_SECONDS = 1500.0
SILENT_SECONDS = 240.0
"""A driver hangs that has logged nothing for so long, or has not ended after DRIVER_SECONDS. Being slow is no hang: on
a fifth of a core a run takes eight minutes."""
POLL_SECONDS = 0.1
TITLES = {"rank": "ray::train-", "reader": "ray::reader-"}
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


@contextmanager
def cluster() -> Iterator[Raylets]:
    """Run raylets for the length of the block."""
    raylets = Raylets(NODES, num_cpus=CPUS_PER_NODE)
    try:
        yield raylets
    finally:
        raylets.close()


class RayRun(Run):
    """A run whose starts are starts of its driver."""

    def leftovers(self) -> list[str]:
        """Return the processes and actors of the run that still live."""
        return super().leftovers() + [f"{process.pid} {title}" for process, title in actors(self.raylets)]

    def recoveries(self) -> list[float]:
        """Return the seconds of the driver's own restarts, too."""
        status = read_status(self.url, self.store)
        own = [restart.recovery_seconds for restart in status.restarts] if status else []
        return super().recoveries() + [seconds for seconds in own if seconds is not None]

    @property
    def raylets(self) -> Raylets:
        """The cluster."""
        assert self.place.raylets is not None
        return self.place.raylets

    def num_steps(self) -> int:
        """Return how many steps rank 0 has begun so far."""
        return sum(len(path.read_text().splitlines()) for path in (self.folder / "steps").glob("*-0.jsonl"))

    def _attempt(self, number: int) -> Attempt:
        faults = [asdict(fault) for fault in self.schedule.faults]
        (self.folder / START_FILE).write_text(json.dumps({"attempt": number, "faults": faults}))
        (self.folder / "config.yaml").write_text(to_yaml(self.config))
        return _DriverStart(self, number).go()


def actors(raylets: Raylets) -> list[tuple[psutil.Process, str]]:
    """Return the ranks and readers that live below our raylets."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ", "status"]):
        title = " ".join(process.info["cmdline"] or [])
        ours = (process.info["environ"] or {}).get("RAY_TMPDIR") == raylets.folder
        if ours and title.startswith(tuple(TITLES.values())) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append((process, title))
    return found


class _DriverStart:
    """One start of the driver, watched to its end."""

    def __init__(self, run: RayRun, number: int) -> None:
        self._run = run
        self._result = Attempt(number, run.schedule.world(number), time.monotonic())
        self._driver = self._start("driver")
        self._second: subprocess.Popen[bytes] | None = None
        self._outside = run.outside(number)
        self._later: list[tuple[float, Callable[[], None]]] = []

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.chaos.ray_driver", str(self._run.folder / "config.yaml")]
        environment = {**os.environ, "CHAOS_FOLDER": str(self._run.folder)}
        environment["RAY_ADDRESS"] = self._run.raylets.cluster.address
        with self._log(name).open("ab") as log:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def _log(self, name: str) -> Path:
        return self._run.folder / "logs" / f"{self._result.number:02d}-{name}.log"

    def go(self) -> Attempt:
        """Wait until the driver has ended or hangs; disturb it, its actors and its cluster meanwhile."""
        while self._driver.poll() is None and not self._hangs():
            self._act()
            for index, fault in list(self._outside):
                if self._run.num_steps() >= fault.hit and self._do(fault):
                    self._run.happened(index)
                    self._outside.remove((index, fault))
                    self._result.disturbed.append(fault.kind)
            time.sleep(POLL_SECONDS)
        return self._end()

    def _hangs(self) -> bool:
        silent_seconds = time.time() - self._log("driver").stat().st_mtime
        return silent_seconds > SILENT_SECONDS or time.monotonic() - self._result.began > DRIVER_SECONDS

    def _act(self, *, at_once: bool = False) -> None:
        """Do what is due: let a stopped process continue, remove a drained node."""
        for entry in list(self._later):
            due, act = entry
            if at_once or time.monotonic() >= due:
                self._later.remove(entry)
                act()

    def _do(self, fault: Fault) -> bool:
        """Let a fault from outside happen; False: it cannot happen yet."""
        what, _, whom = fault.kind.partition("_")
        if fault.kind == "second_driver":
            self._second = self._start("second")
        elif whom == "driver":
            self._hit(self._driver.pid, what, fault.seconds)
        elif whom in TITLES:
            victims = [process for process, title in actors(self._run.raylets) if self._fits(whom, title, fault.rank)]
            if not victims:
                return False
            victims[0].send_signal(SIGNALS[what])
        else:
            node = self._node_of(fault.rank)
            if node is None:
                return False
            self._take_away(node, fault)
        return True

    @staticmethod
    def _fits(whom: str, title: str, rank: int) -> bool:
        return title.startswith(TITLES[whom]) and (whom != "rank" or title.startswith(f"{TITLES[whom]}{rank}"))

    def _hit(self, pid: int, what: str, seconds: float) -> None:
        """Kill a process, or stop it for a while."""
        os.kill(pid, SIGNALS[what])
        if what == "stop":
            self._later.append((time.monotonic() + seconds, lambda: _go_on(pid)))

    def _node_of(self, rank: int) -> Any:
        """Return the node on which a rank lives; none: it does not live now."""
        for process, title in actors(self._run.raylets):
            if self._fits("rank", title, rank):
                parents = {parent.pid for parent in process.parents()}
                return next((node for node in self._run.raylets.nodes if _raylet(node) in parents), None)
        return None

    def _take_away(self, node: Any, fault: Fault) -> None:
        """Kill or stop the raylet of a node, or drain the node; another one comes for it."""
        if fault.kind == "stop_raylet":
            self._hit(_raylet(node), "stop", fault.seconds)
        elif fault.kind == "kill_raylet":
            os.kill(_raylet(node), signal.SIGKILL)
            self._replace(node)
        else:
            drain_node(self._run.raylets.cluster.address, node.node_id, NOTICE_SECONDS)
            self._later.append((time.monotonic() + NOTICE_SECONDS, lambda: self._replace(node)))

    def _replace(self, node: Any) -> None:
        raylets = self._run.raylets
        raylets.remove(node)
        raylets.nodes.remove(node)
        raylets.nodes.append(raylets.add())

    def _end(self) -> Attempt:
        self._act(at_once=True)
        for process in (self._driver, self._second):
            if process is None:
                continue
            try:
                process.wait(DRIVER_SECONDS if process is self._second else 0)  # it may have taken the run over
            except subprocess.TimeoutExpired:
                self._result.hung += [0] if process is self._driver else [1]
                process.kill()
                process.wait()
        self._result.codes = [self._driver.returncode]
        self._result.ended = time.monotonic()
        return self._result


def _go_on(pid: int) -> None:
    if psutil.pid_exists(pid):
        os.kill(pid, signal.SIGCONT)


def _raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)
