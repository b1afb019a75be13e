"""A small two-stage run under a schedule: its ranks are started, disturbed from outside and started again."""

import json
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from isthmus.cluster.config import JobConfig
from isthmus.data_pipeline.dataset.index_build import IndexOptions, build_manifest
from isthmus.data_pipeline.process_pool import run_in_processes
from isthmus.data_pipeline.store.object_store import ObjectStore, join
from isthmus.demo.local_s3 import LocalS3, kill_hard
from isthmus.demo.tiny.assets import write_tiny_assets
from isthmus.trainer.checkpoint.reader import list_checkpoints
from isthmus.trainer.config.loading import load_config
from isthmus.trainer.context import Rank
from tests.chaos.proxy import Proxy
from tests.chaos.schedule import Fault, Schedule
from tests.chaos.start import start
from tests.ranks import free_port

ROOT = Path(__file__).parents[2]
BUCKET = "chaos"
STEPS = {"stage1": 8, "stage2": 6}
NUM_SAMPLES = 64
"""Four batches of 16: stage 1 sees two epochs."""
MAX_ATTEMPTS = 14
ATTEMPT_SECONDS = 240.0
"""An attempt that lasts longer hangs."""
GRACE_SECONDS = 60.0
"""When a rank has ended, the others end within this time: the collective's limit and the last save."""
STOPPED_GRACE_SECONDS = 3.0
SHORT = [
    *(f"{stage}.steps={steps}" for stage, steps in STEPS.items()),
    *(f"{stage}.{key}" for stage in STEPS for key in ("global_batch_size=16", "micro_batch_size=8")),
    "checkpoint.every_steps=2",
    "logging.every_steps=1",
    "evaluation.manifest=null",
    "run.export=true",
    "model.qformer.num_layers=2",
    "safety.step_timeout_seconds=40",
    "safety.collective_timeout_seconds=8",
    "checkpoint.save_timeout_seconds=20",
    "store.stall_timeout_seconds=2",
    "data.reader_timeout_seconds=20",
]
UNDER_RAY = [
    "data.backend=ray",
    "cluster.workers={min: 2, max: 2}",
    "cluster.stop_grace_seconds=30",
    "cluster.unresponsive_seconds=20",
    "safety.collective_timeout_seconds=25",
    "safety.step_timeout_seconds=90",
    "data.reader_timeout_seconds=45",
]
"""Ranks and readers import everything again, so limits are longer."""


@dataclass
class Place:
    """Where the assets and runs of a campaign are."""

    folder: Path
    server: LocalS3 | None = None
    proxy: Proxy | None = None
    bucket_ready: bool = False
    raylets: Any = None
    """The Ray cluster (ray_run.py), where schedules need one."""

    def prepare(self) -> None:
        """Write models and shards into the folder."""
        if not (self.folder / "assets" / "ready").exists():
            write_tiny_assets(self.folder / "assets", NUM_SAMPLES, 4)
            (self.folder / "assets" / "ready").touch()

    def prepare_bucket(self) -> None:
        """Copy the shards into the bucket and index them there."""
        if self.bucket_ready or self.server is None:
            return
        store = ObjectStore(self.server.store_config)
        shards = sorted((self.folder / "assets" / "shards").glob("train*.tar"))
        urls = [store.put_file(join(f"s3://{BUCKET}/shards", path.name), path).url for path in shards]
        build_manifest(urls, f"s3://{BUCKET}/train", store, IndexOptions(64 << 10), run_in_processes(1))
        self.bucket_ready = True

    def config(self, schedule: Schedule, run_folder: Path) -> JobConfig:
        """Return the run's configuration."""
        assets = self.folder / "assets"
        places: dict[str, Any] = {
            "run.name": f"run-{schedule.name}",
            "run.url": f"s3://{BUCKET}/runs" if schedule.s3 else run_folder / "runs",
            "data.sources.0.manifest": f"s3://{BUCKET}/train" if schedule.s3 else assets / "train",
            "data.readers": schedule.readers,
            "model.vision.path": assets / "vision",
            "model.qformer.tokenizer": assets / "bert",
            "model.language.path": assets / "opt",
            "model.qformer.dropout": 0.1,
            "run.virtual_ranks": 4 if schedule.elastic else "null",
        }
        if schedule.cache:
            places |= {"data.cache_dir": run_folder / "cache", "data.cache_bytes": 1 << 20}
        if schedule.s3 and self.server:
            port = self.proxy.port if self.proxy else None
            endpoint = f"http://127.0.0.1:{port}" if port else self.server.endpoint_url
            places |= {"store.endpoint_url": endpoint, "store.region": "us-east-1"}
        overrides = [f"{key}={value}" for key, value in places.items()]
        limits = UNDER_RAY if schedule.ray else ()
        return load_config(ROOT / "recipes" / "tiny.yaml", [*overrides, *SHORT, *limits], JobConfig)


@dataclass
class Attempt:
    """How one start of the run went."""

    number: int
    world: int
    began: float
    ended: float = 0.0
    codes: list[int | None] = field(default_factory=list)
    disturbed: list[str] = field(default_factory=list)
    hung: list[int] = field(default_factory=list)
    """Ranks that did not end by themselves although nobody had stopped them."""

    @property
    def finished(self) -> bool:
        """Whether every rank ended well."""
        return all(code == 0 for code in self.codes)


@dataclass
class Run:
    """A run from its first start to its end."""

    place: Place
    schedule: Schedule
    folder: Path
    attempts: list[Attempt] = field(default_factory=list)

    def __post_init__(self) -> None:
        for part in ("logs", "steps", "tmp"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        self.config = self.place.config(self.schedule, self.folder)
        self.url = join(self.config.run.url, self.config.run.name)

    @property
    def store(self) -> ObjectStore:
        """A store for looking at the run, without faults."""
        server = self.place.server
        return ObjectStore(server.store_config) if self.schedule.s3 and server else ObjectStore(self.config.store)

    def drive(self) -> None:
        """Start the run again and again until it is finished, or too often."""
        if self.place.proxy:
            self.place.proxy.spoilt.clear()
        for number in range(MAX_ATTEMPTS):
            self._damage(number)
            self._spoil_requests()
            attempt = self._attempt(number)
            self._spoil_requests()
            self.attempts.append(attempt)
            if attempt.finished:
                return

    def leftovers(self) -> list[str]:
        """Return the processes of the run that still live."""
        return processes_with("CHAOS_FOLDER", str(self.folder))

    def recoveries(self) -> list[float]:
        """Return the seconds from the end of each start to the next trained step."""
        firsts: dict[int, float] = {}
        for record in self.records():
            number = record["attempt"]
            firsts[number] = min(record["time"], firsts.get(number, record["time"]))
        later = [(a, min((t for n, t in firsts.items() if n > a.number), default=None)) for a in self.attempts]
        return [first - attempt.ended for attempt, first in later if first is not None]

    def records(self) -> list[dict[str, Any]]:
        """Return what the ranks have noted of their steps."""
        lines = [line for path in sorted((self.folder / "steps").glob("*.jsonl")) for line in path.open()]
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def outside(self, number: int) -> list[tuple[int, Fault]]:
        """Return the faults that a start has to expect from outside, numbered."""
        return [
            (index, fault)
            for index, fault in enumerate(self.schedule.faults)
            if fault.attempt <= number and not fault.point and not (self.folder / f"happened-{index}").exists()
        ]

    def happened(self, index: int) -> None:
        """Note that a fault has happened: it does not happen again."""
        (self.folder / f"happened-{index}").touch()

    def _attempt(self, number: int) -> Attempt:
        return _Attempt(self, number).go()

    def _spoil_requests(self) -> None:
        """Note which of the faults on the wire have happened; the others are yet to come."""
        proxy, waiting = self.place.proxy, []
        for index, fault in enumerate(self.schedule.faults):
            if proxy and fault in proxy.spoilt:
                self.happened(index)
            elif fault.kind.startswith("http_"):
                waiting.append(fault)
        if proxy:
            proxy.arm(waiting)

    def _damage(self, number: int) -> None:
        """Flip bytes in what an earlier start has left behind."""
        for index, fault in enumerate(self.schedule.faults):
            if fault.attempt > number or (self.folder / f"happened-{index}").exists():
                continue
            if (fault.kind == "damage_cache" and _flip_cache(self.folder / "cache")) or (
                fault.kind == "damage_checkpoint" and self._flip_checkpoint()
            ):
                self.happened(index)

    def _flip_checkpoint(self) -> bool:
        """Damage the newest checkpoint of a stage that has an older one to fall back to."""
        for stage, steps in STEPS.items():
            found = list_checkpoints(join(self.url, stage, "checkpoints"), self.store)
            if len(found) > 1 and found[0].step < steps:
                url = join(found[0].url, found[0].manifest.parts[-1].name)
                data = bytearray(self.store.get(url))
                data[len(data) // 2] ^= 1
                self.store.put(url, data)
                return True
        return False


class _Attempt:
    """One start of all ranks, watched to its end."""

    def __init__(self, run: Run, number: int) -> None:
        self._run, self._number = run, number
        self._result = Attempt(number, run.schedule.world(number), time.monotonic())
        self._ranks = self._start("rank")
        self._second: list[BaseProcess] = []
        self._stopped: set[int] = set()
        self._outside = run.outside(number)

    def _start(self, name: str) -> list[BaseProcess]:
        context = multiprocessing.get_context("forkserver")
        world, port = self._result.world, free_port()
        faults = tuple(replace(fault, rank=fault.rank % world) for fault in self._run.schedule.faults)
        ranks = []
        for rank in range(world):
            arguments = (
                self._run.config,
                self._run.folder,
                self._number,
                faults if name == "rank" else (),
                Rank(rank, world, rank),
                port,
                name,
            )
            ranks.append(context.Process(target=start, args=arguments, daemon=False))
        for process in ranks:
            process.start()
        return ranks

    def go(self) -> Attempt:
        """Wait until all ranks have ended or must be ended; disturb them meanwhile."""
        deadline = self._result.began + ATTEMPT_SECONDS
        first_end: float | None = None
        while any(rank.is_alive() for rank in self._ranks):
            now = time.monotonic()
            self._note_stopped()
            if first_end is None and (len(self._alive()) < len(self._ranks) or self._all_stopped()):
                first_end = now
            if now > deadline or (first_end and now > first_end + GRACE_SECONDS):
                self._result.hung = [i for i in self._alive() if i not in self._stopped]
                break
            if first_end and now > first_end + STOPPED_GRACE_SECONDS and set(self._alive()) <= self._stopped:
                break
            self._disturb(now - self._result.began)
            wait([rank.sentinel for rank in self._ranks if rank.is_alive()], timeout=0.1)
        return self._end()

    def _alive(self) -> list[int]:
        return [i for i, rank in enumerate(self._ranks) if rank.is_alive()]

    def _all_stopped(self) -> bool:
        return set(self._alive()) <= self._stopped

    def _note_stopped(self) -> None:
        for i, rank in enumerate(self._ranks):
            if i not in self._stopped and rank.pid and rank.is_alive() and _status(rank.pid) == psutil.STATUS_STOPPED:
                self._stopped.add(i)

    def _disturb(self, age: float) -> None:
        for index, fault in list(self._outside):
            if fault.kind.startswith(("http_", "damage_")) or fault.kind == "skew":
                self._outside.remove((index, fault))
                continue
            due = 1 + fault.hit if fault.kind.startswith("s3_") else fault.seconds  # of a server: how long it is away
            if age >= due and self._do(fault):
                self._run.happened(index)
                self._outside.remove((index, fault))

    def _do(self, fault: Fault) -> bool:
        """Let a fault from outside happen; False: it cannot happen yet."""
        server = self._run.place.server
        victim = self._ranks[fault.rank % len(self._ranks)]
        number = {"kill_at": signal.SIGKILL, "stop_at": signal.SIGSTOP, "term_at": signal.SIGTERM}.get(fault.kind)
        if number is not None and victim.pid and victim.is_alive():
            os.kill(victim.pid, number)
        elif fault.kind.endswith("_reader"):
            return self._hit_reader(victim, signal.SIGKILL if fault.kind == "kill_reader" else signal.SIGSTOP)
        elif fault.kind == "second_driver":
            self._second = self._start("second")
        elif fault.kind == "s3_kill" and server:
            kill_hard(server)
            time.sleep(fault.seconds)
            server.restart()
        elif fault.kind == "s3_stop" and server:
            os.kill(server.process.pid, signal.SIGSTOP)
            time.sleep(fault.seconds)
            os.kill(server.process.pid, signal.SIGCONT)
        self._result.disturbed.append(fault.kind)
        return True

    def _hit_reader(self, rank: BaseProcess, number: int) -> bool:
        try:
            children = psutil.Process(rank.pid).children()
        except psutil.NoSuchProcess:
            return False
        for child in children:
            if "spawn_main" in " ".join(child.cmdline()):
                child.send_signal(number)
                return True
        return False

    def _end(self) -> Attempt:
        for process in (*self._ranks, *self._second):
            if process in self._second:
                process.join(ATTEMPT_SECONDS)  # it may have taken the run over
                self._result.hung += [self._second.index(process)] if process.is_alive() else []
            if process.is_alive():
                process.kill()
            process.join(10)
        self._result.codes = [rank.exitcode for rank in self._ranks]
        self._result.ended = time.monotonic()
        return self._result


def processes_with(variable: str, value: str) -> list[str]:
    """Return the processes that were started with a variable in their environment."""
    return [
        f"{process.info['pid']} {' '.join(process.info['cmdline'] or [])[:120]}"
        for process in psutil.process_iter(["pid", "cmdline", "environ"])
        if (process.info["environ"] or {}).get(variable) == value
    ]


def _flip_cache(folder: Path) -> bool:
    files = list(folder.glob("*.chunk")) if folder.exists() else []
    for path in files:
        data = bytearray(path.read_bytes())
        for place in range(600, len(data), 997):
            data[place] ^= 0x55
        path.write_bytes(data)
    return bool(files)


def _status(pid: int) -> str:
    try:
        return psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return psutil.STATUS_DEAD
