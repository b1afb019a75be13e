"""`isthmus models get`, `data ingest` and `data index`, killed anywhere, end with the bytes of an undisturbed call.

A seed decides what goes wrong in up to three calls: SIGKILL at a write (before, during, after), a write that the store
refuses or whose response is lost, SIGKILL during a download, SIGKILL of a worker process or of the command itself, or
an interrupted call with other inputs. The same command is then called once more. 60 more schedules are `slow`.
"""

import contextlib
import importlib
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import psutil
import pytest

from isthmus.cluster.cli import data, model
from isthmus.cluster.cli.main import app
from isthmus.cluster.errors import EXPECTED_ERRORS
from isthmus.data_pipeline.store import s3
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.model.tiny import write_tiny_language
from isthmus.trainer.frozen import model_folder
from tests.chaos.forks import FORKS
from tests.corpus import named_members, picture, write_shards, write_tar
from tests.faulty_store import Fault, FaultyStore
from tests.hub import NAME, Hub, serve_hub
from tests.seaweed import BUCKET

pytestmark = pytest.mark.chaos
TOOLS = ("models", "ingest", "index")
AT_WRITES = ("kill_before", "kill_during", "kill_after", "refuse", "lose_answer")
OTHERS = {"models": ("kill_download",), "ingest": ("other_inputs",), "index": ("other_inputs",)}
NUM_IMAGES = 14
NUM_DOWNLOADS = 8  # responses of the Hub, unless the cache has files already
WEIGHT_FILE_BYTES, PUT_BYTES = 40_000, 2_000
"""Small, so that a tiny model has several weight files, and most objects go to S3 by a multipart upload."""
LIMIT_SECONDS = 120.0


class DeadlyHub(Hub):
    """Kills the command in the middle of a chosen response."""

    command = None
    at_response = -1

    def _send(self, status, data, headers, *, body):
        hub = type(self)
        if body and hub.at_response == 0:
            self.wfile.write(data[: len(data) // 2])
            os.kill(hub.command.pid, signal.SIGKILL)
        hub.at_response -= body
        super()._send(status, data, headers, body=body)


@dataclass(frozen=True)
class Call:
    """One call of a command in a process of its own."""

    arguments: tuple[str, ...]
    store: FaultyStore
    environment: dict[str, str]

    def __call__(self) -> None:
        """Run it as `isthmus` does."""
        os.environ.update(self.environment)
        tempfile.tempdir = None  # read again
        importlib.reload(huggingface_hub.constants)
        s3.PART_BYTES, s3._MAX_PARTS = PUT_BYTES, 1
        model_folder.ModelWriter = partial(model_folder.ModelWriter, file_bytes=WEIGHT_FILE_BYTES)
        data.open_store = model.open_store = lambda *_: self.store
        try:
            app(args=self.arguments, standalone_mode=False)
        except EXPECTED_ERRORS as error:
            print(error)
            os._exit(2)
        os._exit(0)


@dataclass(frozen=True)
class World:
    """What all schedules share."""

    folder: Path
    hub: ThreadingHTTPServer
    store: ObjectStore


@dataclass
class Schedule:
    """The calls of one command until it ends, and what it leaves."""

    world: World
    folder: Path
    tool: str
    out: str
    processes: int = 1

    def __post_init__(self) -> None:
        (self.folder / "tmp").mkdir()

    def call(self, fault: Fault | None = None, *, other: bool = False, meanwhile: Callable = lambda *_: None) -> int:
        """Call the command once; return its exit code."""
        journal = self.folder / f"writes-{len(list(self.folder.glob('writes-*')))}"
        store = FaultyStore(self.world.store.config, journal, fault)
        environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        environment |= {"TMPDIR": str(self.folder / "tmp"), "HF_HUB_CACHE": str(self.folder / "hf")}
        environment["HF_ENDPOINT"] = f"http://127.0.0.1:{self.world.hub.server_port}"
        process = FORKS.Process(target=Call(self._arguments(other=other), store, environment))
        self.world.hub.RequestHandlerClass.command = process
        process.start()
        meanwhile(process, store)
        process.join(LIMIT_SECONDS)
        exit_code = process.exitcode
        process.kill()
        assert exit_code in (0, 2, -signal.SIGKILL), f"{exit_code}; None: it hangs"
        return exit_code

    def _arguments(self, *, other: bool) -> tuple[str, ...]:
        workers = ("--processes", str(self.processes))
        if self.tool == "models":
            return ("models", "get", NAME, self.out)
        shards, images = str(self.world.folder / "shards"), str(self.world.folder / "images")
        if self.tool == "index":
            return ("data", "index", shards, "--out", self.out, "--chunk-mb", "0.01" if other else "0.005", *workers)
        source, text = self.folder / "source.jsonl", "another" if other else "a"
        rows = [{"path": f"{i}.jpg", "captions": [f"{text} picture {i}"]} for i in range(NUM_IMAGES)]
        source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return ("data", "ingest", str(source), self.out, "--images", images, "--samples-per-shard", "4", *workers)

    def content(self) -> dict[str, bytes]:
        """Return every object, without the names of the schedule's own folders."""
        found, store = {}, self.world.store
        for info in store.list(self.out):
            content = bytes(store.get(info.url)).replace(self.out.encode(), b"OUT")
            found[info.url.removeprefix(self.out)] = content.replace(str(self.folder).encode(), b"FOLDER")
        return found

    def leftovers(self) -> list[str]:
        """Return what no call should leave: hidden and temporary files, unfinished uploads, processes."""
        files = [*(self.folder / "tmp").iterdir(), *self.folder.rglob(".isthmus-*")]
        client = self.world.store._s3._client.boto_client()
        prefix = self.out.removeprefix(f"s3://{BUCKET}/")
        uploads = client.list_multipart_uploads(Bucket=BUCKET, Prefix=prefix).get("Uploads", [])
        ours = {"TMPDIR": str(self.folder / "tmp")}.items()
        workers = (one for one in psutil.process_iter(["environ"]) if ours <= (one.info["environ"] or {}).items())
        living = psutil.wait_procs(workers, timeout=10)[1]
        for worker in living:
            worker.kill()
        return [*map(str, files), *(upload["Key"] for upload in uploads), *map(str, living)]


@pytest.fixture(scope="module")
def world(seaweed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    (folder / "images").mkdir()
    for i in range(NUM_IMAGES - 1):  # the last one is missing
        (folder / "images" / f"{i}.jpg").write_bytes(picture(i, size=(320, 240)))
    write_shards(folder / "shards", [4, 3, 5])
    write_tar(folder / "shards" / "00003.tar", [*named_members([20]), ("21.txt", b"a caption without a picture")])
    files = {path.name: path.read_bytes() for path in write_tiny_language(folder / "opt", "opt").iterdir()}
    store = ObjectStore(seaweed.store_config)
    with serve_hub(files, DeadlyHub) as hub:
        yield World(folder, hub, store)


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    """For each tool: the number of writes and the objects of a call that nothing happened to."""
    results = {}
    for tool in TOOLS:
        folder = tmp_path_factory.mktemp(tool)
        schedule = Schedule(world, folder, tool, str(folder / "out"))
        assert schedule.call() == 0
        assert schedule.leftovers() == []
        results[tool] = len((folder / "writes-0").read_text().splitlines()), schedule.content()
    return results


def disturb(schedule: Schedule, rng: random.Random, at_write: int) -> int:
    """Call the command once while something goes wrong; return its exit code."""
    others = ["kill_process"] * 3 if schedule.processes > 1 else OTHERS[schedule.tool]
    kind = rng.choice([*AT_WRITES, *others])
    print("fault:", kind, at_write)
    if kind == "other_inputs":
        return schedule.call(Fault(rng.choice(AT_WRITES), at_write), other=True)
    if kind == "kill_process":
        slow = Fault("delay", 0, num_writes=1000)  # so that there is something to kill
        return schedule.call(slow, meanwhile=partial(kill_process, rng=rng, after=at_write))
    if kind == "kill_download":
        hub = schedule.world.hub.RequestHandlerClass
        hub.at_response = rng.randrange(NUM_DOWNLOADS)
        exit_code = schedule.call()
        hub.at_response = -1
        return exit_code
    return schedule.call(Fault(kind, at_write))


def kill_process(process, store, *, rng: random.Random, after: int) -> None:
    """Kill the command or one of its workers, at a random moment after so many writes."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while len(store.writes()) < max(1, after) and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.3))
    with contextlib.suppress(psutil.NoSuchProcess):  # it may have ended
        command = psutil.Process(process.pid)
        workers = [child for child in command.children() if "spawn_main" in " ".join(child.cmdline())]
        rng.choice([command, *workers]).kill()


def check(tool, seed, world, undisturbed, folder):
    """Run a schedule and compare what it wrote with the undisturbed call."""
    rng = random.Random(f"{tool} {seed}")
    out = f"s3://{BUCKET}/tool-kills/{tool}-{seed:02d}" if seed % 2 else str(folder / "out")
    schedule = Schedule(world, folder, tool, out, processes=2 if tool != "models" and seed % 3 == 2 else 1)
    num_writes, content = undisturbed[tool]
    num_faults = rng.randrange(1, 4)
    disturbed = [disturb(schedule, rng, rng.randrange(num_writes // num_faults)) for _ in range(num_faults)]
    assert any(disturbed)
    assert schedule.call() == 0
    assert schedule.content() == content
    assert schedule.leftovers() == []


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("tool", TOOLS)
def test_killed_or_refused(tool, seed, world, undisturbed, tmp_path):
    check(tool, seed, world, undisturbed, tmp_path)


def test_an_ingest_of_two_processes_is_killed(world, undisturbed, tmp_path):
    check("ingest", 2, world, undisturbed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 23))
@pytest.mark.parametrize("tool", TOOLS)
def test_more_kills(tool, seed, world, undisturbed, tmp_path):
    check(tool, seed, world, undisturbed, tmp_path)
