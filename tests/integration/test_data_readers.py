"""Reader processes and Ray reader actors over a real S3 server: the bytes of an in-process reader, whatever dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray

from isthmus.data_pipeline.config import DataConfig, StoreConfig
from isthmus.data_pipeline.dataset.shard_index import ShardIndex
from isthmus.data_pipeline.errors import PoisonPartError, ReadersUnavailable
from isthmus.data_pipeline.reading import loader as loader_module
from isthmus.data_pipeline.reading import part_queue, processes
from isthmus.data_pipeline.reading.actors import ReaderPool, find_reader
from isthmus.data_pipeline.reading.loader import Loader
from isthmus.data_pipeline.reading.reader import Reader
from isthmus.data_pipeline.store.object_store import AccessError, ObjectStore
from tests.seaweed import BUCKET
from tests.unit.data_pipeline.tar_set import Encoder, assert_equal, good_sample, loader, take, write_set

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

STEPS = 12


@pytest.fixture(scope="module")
def store(seaweed):
    return ObjectStore(StoreConfig(endpoint_url=seaweed.endpoint_url, region="us-east-1", max_attempts=3))


@pytest.fixture(scope="module")
def manifest(store):
    samples = [good_sample(i) for i in range(80)]
    samples[33] = ("000033", {"jpg": b"no picture", "txt": b"bad"})
    return write_set(f"s3://{BUCKET}/readers", samples, store=store)


@pytest.fixture(scope="module")
def expected(store, manifest):
    return take(loader(manifest, store=store), 0, STEPS)


def wait_until_gone(process_ids, seconds=20):
    deadline = time.monotonic() + seconds
    while any(psutil.pid_exists(process_id) for process_id in process_ids):
        assert time.monotonic() < deadline, f"still there after {seconds} s: {process_ids}"
        time.sleep(0.05)


def test_processes_give_the_same_bytes_ignore_sigterm_and_are_replaced(store, manifest, expected):
    made = loader(manifest, store=store, readers=2)
    assert made._backend.process_ids == []  # none starts before it is asked
    try:
        for step, batch in enumerate(made.batches(0, STEPS)):
            assert_equal(batch, expected[step])
            if step == 2:
                first = made._backend.process_ids
                for process_id in first:
                    os.kill(process_id, signal.SIGTERM)
                    os.kill(process_id, signal.SIGINT)
            if step == 4:
                assert made._backend.process_ids == first
                os.kill(first[0], signal.SIGKILL)
        last = made._backend.process_ids
        assert last[0] != first[0]
        assert last[1] == first[1]
        assert made.metrics()["parts_asked_again"] >= 1
        masked = sum(int((~batch.valid_B).sum()) for batch in expected)
        assert [record.key for record in made.take_bad_records()] == ["000033"] * masked
    finally:
        made.close()
    wait_until_gone([*first, *last])


ORPHAN = """
import os, sys
from isthmus.data_pipeline.config import StoreConfig
from isthmus.data_pipeline.store.object_store import ObjectStore
from tests.unit.data_pipeline.tar_set import loader
if __name__ == "__main__":
    made = loader(sys.argv[1], store=ObjectStore(StoreConfig(endpoint_url=sys.argv[2], region="us-east-1")), readers=1)
    batches = made.batches(0, 100)
    next(batches)
    print(*made._backend.process_ids, flush=True)
    os.kill(os.getpid(), 9)
"""


def test_processes_die_with_their_parent(tmp_path, seaweed, manifest):
    script = tmp_path / "parent.py"
    script.write_text(ORPHAN)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, script, manifest, seaweed.endpoint_url],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=False,
    )
    process_ids = [int(word) for word in done.stdout.split()]
    assert len(process_ids) == 1, done.stderr
    wait_until_gone(process_ids)


def test_without_permission_the_run_stops_and_says_so(seaweed, manifest, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    wrong = ObjectStore(StoreConfig(endpoint_url=seaweed.endpoint_url, region="us-east-1", max_attempts=2))
    with pytest.raises(AccessError):
        loader(manifest, store=wrong)


def test_an_error_in_a_reader_reaches_the_worker(store, manifest, monkeypatch):
    plan = loader(manifest, store=store).plan
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")  # inherited by the reader that starts now
    config = DataConfig(sources=({"manifest": manifest},), lanes=4, readers=1)
    made = Loader(config, store, plan, Encoder(), image_size_pixels=32)
    with pytest.raises(AccessError, match="check the credentials"):
        take(made, 0, 1)


@pytest.fixture(scope="module")
def local_ray(seaweed, tmp_path_factory):
    paths = {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        _temp_dir=str(tmp_path_factory.mktemp("r")),
        object_store_memory=200 << 20,
        log_to_driver=False,
        runtime_env={"env_vars": paths},
    )
    yield
    ray.shutdown()


def test_ray_actors_give_the_same_bytes_and_a_dead_one_is_replaced(local_ray, store, manifest, expected):
    made = loader(manifest, store=store, backend="ray", readers=2)
    try:
        for step, batch in enumerate(made.batches(0, STEPS)):
            assert_equal(batch, expected[step])
            if step == 3:
                first = ray.get_actor("reader-1")
                ray.kill(first)
            if step == 7:
                assert ray.get_actor("reader-1")._actor_id != first._actor_id
                pid = ray.get(ray.get_actor("reader-0").process_id.remote(), timeout=20)
                os.kill(pid, signal.SIGTERM)
                os.kill(pid, signal.SIGINT)
        assert ray.get(ray.get_actor("reader-0").process_id.remote(), timeout=20) == pid
        assert made.metrics()["parts_asked_again"] > 0
    finally:
        made.close()
    assert made.metrics()["bad_samples"] == sum(int((~batch.valid_B).sum()) for batch in expected)


def open_ranks(store, manifest):
    return [loader(manifest, store=store, backend="ray", readers=2, rank=rank, world_size=2) for rank in range(2)]


def check(ranks, expected, num_steps):
    for made in ranks:
        for step, batch in enumerate(made.batches(0, num_steps)):
            assert batch.keys == [expected[step].keys[row] for row in batch.rows_B]


def test_ranks_share_the_actors_of_a_pool_which_outlive_them(local_ray, store, manifest, expected):
    pool = ReaderPool({})
    pool.keep(2)
    actors = [ray.get_actor(f"reader-{number}")._actor_id for number in range(2)]
    first, second = open_ranks(store, manifest), []
    try:
        check(first, expected, 3)
        first[0].ask(0, STEPS)
        first[0].close()  # the other rank was killed, say: its actor is not told
        second = open_ranks(store, manifest)
        check(second, expected, 3)
        pool.keep(2)
        assert [ray.get_actor(f"reader-{number}")._actor_id for number in range(2)] == actors
        with pytest.raises(RuntimeError, match=r"does not read for .* any more"):
            take(first[1], 3, 1)
    finally:
        for made in first + second:
            made.close()
        pool.close()
    wait_until_absent(2)


def wait_until_absent(num_readers, seconds=20):
    deadline = time.monotonic() + seconds
    while any(find_reader(number) for number in range(num_readers)):
        assert time.monotonic() < deadline, f"readers still live after {seconds} s"
        time.sleep(0.05)


class PoisonedReader(Reader):
    """Ends its process at one sample, as a decoder that crashes does."""

    def read(self, request):
        if any(sample.position == 21 and sample.epoch == 0 for sample in request.samples):
            os._exit(3)
        return super().read(request)


def test_a_sample_that_ends_its_readers_stops_the_run_and_is_named(tmp_path, monkeypatch):
    url = write_set(str(tmp_path / "set"), [good_sample(i) for i in range(40)])
    monkeypatch.setattr(loader_module, "Reader", PoisonedReader)
    monkeypatch.setattr(part_queue, "_REPLACE_PAUSE_SECONDS", 0.0)
    made = loader(url, readers=1)
    (culprit,) = (s for lane in range(4) for s in made.plan.lane_samples(2, lane) if s.position == 21)
    index = ShardIndex.load(made.plan.manifests[0].shards[culprit.shard], ObjectStore())
    key = index.key(index.first_sample(culprit.chunk) + culprit.sample)
    with pytest.raises(PoisonPartError, match=rf"step 2, lane .*\.tar#{key}.*ended with exit code 3"):
        take(made, 0, 4)


def test_a_reader_that_is_killed_again_and_again_while_it_starts_is_only_replaced(tmp_path, monkeypatch):
    url = write_set(str(tmp_path / "set"), [good_sample(i) for i in range(40)])
    expected = take(loader(url), 0, 2)
    monkeypatch.setattr(part_queue, "_REPLACE_PAUSE_SECONDS", 0.0)
    made = loader(url, readers=1)
    starts = []

    class KilledAtStart(processes._ReaderProcess):
        def __init__(self, *args):
            super().__init__(*args)
            starts.append(self.process_id)
            if len(starts) < 6:
                os.kill(self.process_id, signal.SIGKILL)

    monkeypatch.setattr(processes, "_ReaderProcess", KilledAtStart)
    for one, other in zip(take(made, 0, 2), expected, strict=True):
        assert_equal(one, other)
    assert len(starts) == 6


def test_a_sample_that_ends_its_actors_stops_the_run_too(local_ray, tmp_path, monkeypatch):
    url = write_set(str(tmp_path / "set"), [good_sample(i) for i in range(40)])
    monkeypatch.setattr(loader_module, "Reader", PoisonedReader)
    monkeypatch.setattr(part_queue, "_REPLACE_PAUSE_SECONDS", 0.0)
    with pytest.raises(PoisonPartError, match=r"step 2, lane .*last: actor reader-0"):
        take(loader(url, backend="ray", readers=1), 0, 4)


def test_an_actor_that_fits_no_node_is_not_the_users_error(local_ray, tmp_path):
    url = write_set(str(tmp_path / "set"), [good_sample(i) for i in range(40)])
    made = loader(url, backend="ray", readers=1, reader_resources={"nowhere": 1}, reader_timeout_seconds=2)
    with pytest.raises(ReadersUnavailable, match=r"no reader for 2 s, it has not started.*data\.reader_resources"):
        take(made, 0, 1)
