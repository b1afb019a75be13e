"""A bootstrap that is killed anywhere ends with the bytes of one that never was: 20 seeded kills, 3 of them each time.

A seed decides what dies and when: the process that works, before, during or after one of its writes; the store, which
refuses a write or loses its answer; on Ray an actor of the pool, which the driver replaces, or the driver.
"""

import multiprocessing
import os
import random
import signal
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
import ray

from isthmus.bootstrap.caption import CAPTIONS, caption_work
from isthmus.bootstrap.config import CaptionConfig, ScoreConfig
from isthmus.bootstrap.ray_pool import run_in_actors
from isthmus.bootstrap.score import SCORED, score_work
from isthmus.bootstrap.stage import Pool, ShardDone, ShardTask, ShardWork, run_stage
from isthmus.data_pipeline.config import StoreConfig
from isthmus.data_pipeline.dataset.manifest import Manifest
from isthmus.data_pipeline.errors import UnavailableError
from isthmus.data_pipeline.process_pool import Runner, run_in_processes
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.model.errors import ModelError
from tests.chaos.forks import FORKS
from tests.faulty_store import Fault, FaultyStore
from tests.integration.cluster.raylets import Raylets, wait_for
from tests.tiny_exports import write_exports, write_pictures

pytestmark = pytest.mark.chaos
SHARDS = [4, 3, 5, 2]
WRITES = 2 * (3 * len(SHARDS) + 1)
"""Table, record and times of every shard, and the commit, of two stages."""
STARTS = 6
SHARD_SECONDS = 0.4
LIMIT_SECONDS = 120.0
HERE = Pool(run_in_processes(1))
DRIVERS = multiprocessing.get_context("spawn")
"""Drivers on Ray begin with the cluster's environment."""


@dataclass(frozen=True)
class Inputs:
    captioner: str
    filter: str
    manifest: str


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    captioner, judge = write_exports(tmp_path_factory.mktemp("exports"))
    return Inputs(str(captioner), str(judge), write_pictures(tmp_path_factory.mktemp("pictures"), SHARDS))


@pytest.fixture(scope="module")
def unbroken(inputs, tmp_path_factory):
    """The bytes of a bootstrap that nothing happened to."""
    folder = tmp_path_factory.mktemp("unbroken")
    bootstrap(inputs, folder, ObjectStore(), HERE)
    return layers(folder)


@pytest.fixture(scope="module")
def raylets():
    cluster = Raylets(2)
    cluster.connect("bootstrap")
    yield cluster
    cluster.close()


def bootstrap(inputs: Inputs, folder: Path, store: ObjectStore, pool: Pool) -> None:
    """Caption and score; what is done is skipped."""
    manifest, out = Manifest.load(inputs.manifest, store), str(folder)
    caption = CaptionConfig(model=inputs.captioner, num_candidates=3, max_new_tokens=5, batch_size=4)
    run_stage(caption_work(manifest, out, caption, store), manifest, out, store, pool)
    score = ScoreConfig(models=(inputs.filter,), batch_size=4)
    run_stage(score_work(manifest, out, score, store), manifest, out, store, pool)


def layers(folder: Path) -> dict[str, bytes]:
    """Return every object; no partial file of a killed process is left."""
    assert list(folder.rglob(".isthmus-*")) == []
    store = ObjectStore()
    urls = [info.url for name in (CAPTIONS, SCORED) for info in store.list(str(folder / name))]
    return {url.removeprefix(str(folder)): bytes(store.get(url)) for url in urls}


def kill_here(seed: int, inputs: Inputs, folder: Path) -> int:
    """Start until the bootstrap is done, with a fault at a random write of the first starts; return the starts."""
    rng = random.Random(seed)
    for start in range(STARTS):
        kind = rng.choice(["kill_before", "kill_during", "kill_after", "refuse", "lose_answer"])
        fault = Fault(kind, at_write=rng.randrange(WRITES // 2)) if start < 2 else None
        store = FaultyStore(StoreConfig(), folder / f"journal-{start}", fault)
        process = FORKS.Process(target=attempt, args=(inputs, folder / "out", store))
        process.start()
        process.join(LIMIT_SECONDS)
        assert process.exitcode is not None, "hangs"
        if process.exitcode == 0:
            return start + 1
        assert process.exitcode in (-signal.SIGKILL, 2)
    raise AssertionError(f"not done after {STARTS} starts")


def attempt(inputs: Inputs, folder: Path, store: ObjectStore) -> None:
    try:
        bootstrap(inputs, folder, store, HERE)
    except UnavailableError:  # as the command ends, with one line
        os._exit(2)
    os._exit(0)


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_a_write_or_refused_by_the_store(seed, inputs, unbroken, tmp_path):
    assert kill_here(seed, inputs, tmp_path) > 1
    assert layers(tmp_path / "out") == unbroken


@dataclass(frozen=True)
class Slowly:
    """Work that takes long enough to be killed in."""

    work: ShardWork

    def __call__(self, task: ShardTask) -> ShardDone:
        time.sleep(SHARD_SECONDS)
        return self.work(task)


def slowly(run: Runner) -> Runner:
    return lambda work, tasks: run(Slowly(work), tasks)


def shards_done(folder: Path) -> int:
    return len(list(folder.rglob("tables/*.json")))


def kill_an_actor(raylets: Raylets, folder: Path, after: int, killed: list[int]) -> None:
    """Kill one of the pool's actors as soon as so many shards are done."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline and not killed:
        time.sleep(0.02)
        if shards_done(folder) < after:
            continue
        for process in psutil.process_iter(["cmdline", "environ"]):
            ours = (process.info["environ"] or {}).get("RAY_TMPDIR") == raylets.folder
            if ours and "MapWorker" in " ".join(process.info["cmdline"] or ()):
                process.kill()
                killed.append(shards_done(folder))
                break


def kill_worker(seed: int, inputs: Inputs, folder: Path, raylets: Raylets) -> int:
    """Run on two actors, one of which is killed; return how many shards were done by then."""
    killed: list[int] = []
    after = random.Random(seed).randrange(1, 2 * len(SHARDS) - 1)
    killer = threading.Thread(target=kill_an_actor, args=(raylets, folder, after, killed))
    killer.start()
    bootstrap(inputs, folder, ObjectStore(), Pool(slowly(run_in_actors((2, 2))), 2))
    killer.join()
    (at,) = killed
    return at


def drive(inputs: Inputs, folder: Path, address: str) -> None:
    ray.init(address=address, namespace="bootstrap", log_to_driver=False)
    bootstrap(inputs, folder, ObjectStore(), Pool(slowly(run_in_actors((2, 2))), 2))


def kill_driver(seed: int, inputs: Inputs, folder: Path, raylets: Raylets) -> None:
    """Start a driver on two actors and kill it once some shards are done; a second one ends by itself."""
    for after in (random.Random(seed).randrange(1, 2 * len(SHARDS) - 1), 0):
        driver = DRIVERS.Process(target=drive, args=(inputs, folder, raylets.cluster.address))
        driver.start()
        if after:
            wait_for(lambda after=after: shards_done(folder) >= after, LIMIT_SECONDS, f"{after} shards")
            driver.kill()
        driver.join(LIMIT_SECONDS)
        assert driver.exitcode == (-signal.SIGKILL if after else 0)


def test_an_actor_of_the_pool_is_killed(inputs, unbroken, raylets, tmp_path):
    assert kill_worker(0, inputs, tmp_path, raylets) < 2 * len(SHARDS)
    assert layers(tmp_path) == unbroken


def test_an_error_in_an_actor_ends_the_stage_as_itself(inputs, raylets, tmp_path):
    with pytest.raises(ModelError, match="an export of stage 1 has no language model"):
        bootstrap(replace(inputs, captioner=inputs.filter), tmp_path, ObjectStore(), Pool(run_in_actors((1, 1))))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 16))
def test_more_kills_here(seed, inputs, unbroken, tmp_path):
    assert kill_here(seed, inputs, tmp_path) > 1
    assert layers(tmp_path / "out") == unbroken


@pytest.mark.slow
def test_another_actor_of_the_pool_is_killed(inputs, unbroken, raylets, tmp_path):
    assert kill_worker(1, inputs, tmp_path, raylets) < 2 * len(SHARDS)
    assert layers(tmp_path) == unbroken


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_a_driver_on_ray_is_killed(seed, inputs, unbroken, raylets, tmp_path):
    kill_driver(seed, inputs, tmp_path, raylets)
    assert layers(tmp_path) == unbroken
