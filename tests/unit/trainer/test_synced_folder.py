"""Records reach the object store: each byte once, past an outage, and never at the cost of a training step."""

import contextlib
import tempfile
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.cluster.config import JobConfig
from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.reading.quarantine import BadRecord
from isthmus.data_pipeline.store.object_store import NotFoundError, ObjectInfo, ObjectStore, UnavailableError, join
from isthmus.trainer.config.loading import load_config
from isthmus.trainer.context import LocalContext
from isthmus.trainer.errors import LeaseError
from isthmus.trainer.monitoring.goodput import GoodputLedger
from isthmus.trainer.monitoring.loggers import JsonlLogger, TensorBoardLogger
from isthmus.trainer.monitoring.monitor import Monitor
from isthmus.trainer.monitoring.quarantine_log import QuarantineLog
from isthmus.trainer.monitoring.segments import SegmentedLog, read_records
from isthmus.trainer.monitoring.synced_folder import SyncedFolder
from tests.saved_states import fragments_of, holds, manager, state_of

pytestmark = pytest.mark.unit
URL = "s3://bucket/run/stage1"


@pytest.fixture(autouse=True, scope="module")
def temporary_folders(tmp_path_factory):
    """A place for the folders of writers that are killed here, which remove nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("synced")))
        yield


class MemoryStore(ObjectStore):
    """Objects in a dictionary; notes every put; refuses or holds back those that it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.objects: dict[str, bytes] = {}
        self.puts: list[tuple[str, int]] = []
        self.refuse_next = ""
        self.respond = threading.Event()
        self.respond.set()

    def put(self, url, data):
        assert self.respond.wait(60)
        if self.refuse_next and self.refuse_next in url:
            self.refuse_next = ""
            raise UnavailableError(f"{url}: 503 on purpose")
        self.puts.append((url, len(data)))
        self.objects[url] = bytes(data)
        return ObjectInfo(url, len(data), "1")

    def get(self, url):
        if url not in self.objects:
            raise NotFoundError(url)
        return self.objects[url]

    def download(self, url, path, *, etag=None):
        path.write_bytes(self.get(url))

    def list(self, folder_url, name_prefix=""):
        found = [url for url in sorted(self.objects) if url.startswith(f"{folder_url}/{name_prefix}")]
        return iter([ObjectInfo(url, len(self.objects[url]), "1") for url in found])

    def delete(self, url):
        self.objects.pop(url, None)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


KINDS = ("metrics", "quarantine", "tensorboard", "goodput")


def sent(store: MemoryStore) -> dict[str, int]:
    """Bytes put so far, by kind."""
    return {kind: sum(size for url, size in store.puts if f"/{kind}" in url) for kind in KINDS}


def test_bytes_of_a_run_of_250_000_steps_are_linear_in_its_length():
    """A record every ten steps, a push every 40 s, a checkpoint every 10 minutes, sometimes a replicated snapshot.

    Sent whole at each push, as before segments, the second half of a run uploads three times as much as the first.
    """
    store, clock = MemoryStore(), Clock()
    synced = SyncedFolder(URL, store)
    metrics, events = JsonlLogger(synced, -1, 8), TensorBoardLogger(synced, -1, clock)
    metrics._clock = clock
    quarantine = QuarantineLog(synced, 0)
    ledger = GoodputLedger(None, lambda data: synced.put("s3://bucket/run/goodput.json", data), clock=clock)
    for step in range(10, 250_001, 10):
        clock.now += 20.0
        for logger in (metrics, events):
            logger.log(step, {"loss/total": 1 / step})
        if step % 300 == 0:
            bad = BadRecord(step, 0, 0, 0, 0, "s3://bucket/data/00000.tar", "key", 512, "decode", "truncated")
            quarantine.add([bad])
            ledger.mark("stage1", step)
        for log in (metrics, events, quarantine):
            if step % 300 == 0:
                log.end_segment()
            elif step % 900 == 500:
                log.send()
        if step % 20 == 0:
            metrics.flush()
            events.flush()
            ledger.write()
            synced.wait()
        if step == 125_000:
            half = sent(store)
    for log in (metrics, events, quarantine):
        log.end_segment()
    synced.close()
    whole = sent(store)
    assert len(read_records(URL, "metrics", store)) == 25_000
    assert {kind: size for kind, size in whole.items() if size > 2.1 * half[kind] or not half[kind]} == {}
    for kind in ("metrics", "quarantine", "tensorboard"):
        kept = sum(len(data) for url, data in store.objects.items() if f"/{kind}" in url)
        assert whole[kind] < 1.2 * kept, kind  # once, but for what was in use when a snapshot was replicated
    assert max(size for _, size in store.puts) < 1 << 20


def test_records_that_were_refused_are_sent_again_before_the_commit(tmp_path, caplog):
    """With the result of the old push kept, every retry of the save failed although the store was well again."""
    store = MemoryStore()
    synced = SyncedFolder(URL, store)
    synced.write("metrics/000000001.00.jsonl", b'{"step": 1}\n')
    store.refuse_next = "metrics"
    synced.push()
    checkpoints = manager(str(tmp_path), assert_owner=synced.wait)
    checkpoints.save(1, fragments_of(1), state_of(1))
    checkpoints.wait()
    assert holds(checkpoints.latest(), 1)
    checkpoints.close()
    assert store.objects[join(URL, "metrics/000000001.00.jsonl")] == b'{"step": 1}\n'
    assert "the next push will retry" in caplog.text
    synced.close()


def test_a_commit_never_overtakes_its_records(tmp_path):
    store = MemoryStore()
    synced = SyncedFolder(URL, store)
    store.respond.clear()
    synced.write("metrics/000000001.00.jsonl", b'{"step": 1}\n')
    checkpoints = manager(str(tmp_path), assert_owner=synced.wait)
    checkpoints.save(1, fragments_of(1), state_of(1))
    checkpoints._saver._thread.join(0.5)
    assert not list(tmp_path.rglob("MANIFEST.json"))
    store.respond.set()
    checkpoints.wait()
    assert list(tmp_path.rglob("MANIFEST.json"))
    checkpoints.close()
    synced.close()


def test_an_outage_of_the_store_blocks_no_step():
    """Goodput was written in the step itself: all ranks waited for it, up to the limit of the next collective."""
    store = MemoryStore()
    store.respond.clear()
    synced = SyncedFolder(URL, store)
    ledger = GoodputLedger(None, lambda data: synced.put("s3://bucket/run/goodput.json", data))

    def train() -> None:
        log = SegmentedLog(synced, "metrics", -1)
        for step in range(100):
            log.append(step, {"loss": 1.0})
            log.end_segment()
            ledger.write()
            synced.push()

    steps = threading.Thread(target=train, daemon=True)
    steps.start()
    steps.join(30)
    assert not steps.is_alive()
    assert store.puts == []
    store.respond.set()
    synced.wait()
    assert [record["step"] for record in read_records(URL, "metrics", store)] == list(range(100))
    assert len([url for url, _ in store.puts if url.endswith("goodput.json")]) <= 2, "only the newest is sent"
    synced.close()


def test_a_failed_attempt_waits_for_no_store_and_commits_nothing_without_its_records():
    """The next attempt waited up to two minutes for the last one's records."""
    store = MemoryStore()
    config = load_config("tiny.yaml", [], JobConfig)
    with (
        contextlib.suppress(ZeroDivisionError),
        Monitor(config, "stage1", LocalContext(), store, "s3://bucket/run") as monitor,
    ):
        monitor.start()
        store.respond.clear()
        monitor.flush()
        raise ZeroDivisionError
    with pytest.raises(DataError, match="closed"):
        monitor.wait_for_records()
    assert store.puts == [], "the attempt ended before the store answered"
    store.respond.set()


def test_a_lost_run_is_no_failed_upload(tmp_path):
    def lost() -> None:
        raise LeaseError("held by another")

    checkpoints = manager(str(tmp_path), assert_owner=lost)
    checkpoints.save(1, fragments_of(1), state_of(1))
    with pytest.raises(LeaseError):
        checkpoints.wait()
    checkpoints.close()


@settings(max_examples=80, deadline=None)
@given(
    starts=st.lists(st.tuples(st.integers(1, 8), st.integers(0, 8)), min_size=1, max_size=6),
    ends=st.integers(1, 5),
)
def test_every_step_is_recorded_once_wherever_a_run_is_killed(starts, ends):
    """Each start records some steps, is killed, and the next one resumes from a step that was sent."""
    store = MemoryStore()
    first = 1
    for steps, back in starts:
        synced = SyncedFolder(URL, store)
        log = SegmentedLog(synced, "metrics", first - 1)
        for step in range(first, first + steps):
            log.append(step, {"start": first})
            if step % ends == 0:
                log.end_segment()
            elif step % 2:
                log.send()
            synced.wait()
        sent = max([record["step"] for record in read_records(URL, "metrics", store)], default=0)
        first = max(0, sent - back) + 1
    synced = SyncedFolder(URL, store)
    SegmentedLog(synced, "metrics", first - 1)
    synced.close()
    assert [record["step"] for record in read_records(URL, "metrics", store)] == list(range(1, first))


def test_a_segment_ends_when_it_is_old_and_its_name_is_used_once(tmp_path):
    clock = Clock()
    log = SegmentedLog(SyncedFolder(str(tmp_path), ObjectStore()), "metrics", -1, clock)
    for number in range(3):
        log.append(5, {"n": number})
        log.flush()
        log.append(5, {"n": number})
        clock.now += 301
        log.flush()
    assert sorted(path.name for path in (tmp_path / "metrics").iterdir()) == [f"000000005.0{n}.jsonl" for n in range(3)]
    assert [record["n"] for record in read_records(str(tmp_path), "metrics", ObjectStore())] == [0, 0, 1, 1, 2, 2]


def test_the_background_thread_ends_with_the_folder():
    before = threading.active_count()
    synced = SyncedFolder(URL, MemoryStore())
    synced.put("s3://bucket/x", b"1")
    synced.close()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
