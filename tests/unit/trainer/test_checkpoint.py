"""Saving, finding, verifying, falling back, keeping and deleting; in a local folder, in one process."""

import hashlib
import json
import os
import resource
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from isthmus.data_pipeline.config import StoreConfig
from isthmus.data_pipeline.store.object_store import ObjectStore, UnavailableError, join
from isthmus.trainer.checkpoint import commit
from isthmus.trainer.checkpoint.format import MANIFEST, Manifest, hash_file, step_name
from isthmus.trainer.checkpoint.interval import Interval, young_daly_seconds
from isthmus.trainer.checkpoint.reader import _BLOCKS_AHEAD, BlockReader, SavedCheckpoint, list_checkpoints
from isthmus.trainer.checkpoint.retention import best_step, kept_steps, prune
from isthmus.trainer.checkpoint.staging import Snapshot
from isthmus.trainer.checkpoint.train_state import TrainState
from isthmus.trainer.config.schema import CheckpointConfig
from isthmus.trainer.context import Rank
from isthmus.trainer.engine.state_shards import Fragment
from isthmus.trainer.errors import CheckpointError, LeaseError
from tests.faulty_store import Fault, FaultyStore
from tests.saved_states import SHAPES, fragments_of, full, holds, manager, state_of

pytestmark = pytest.mark.unit


@pytest.fixture
def one_try(monkeypatch):
    """No time is left for a second try of a failed save, however slow the first one was."""
    monkeypatch.setattr("isthmus.trainer.checkpoint.commit.FIRST_PAUSE_SECONDS", 1e6)


def save(folder: str, *steps: int, **settings: object) -> None:
    checkpoints = manager(folder, **settings)
    for step in steps:
        checkpoints.save(step, fragments_of(step), state_of(step))
        checkpoints.wait()
    checkpoints.close()


def newest(folder: str) -> SavedCheckpoint | None:
    checkpoints = manager(folder)
    try:
        return checkpoints.latest()
    finally:
        checkpoints.close()


def part_of(folder: str, step: int) -> Path:
    return next((Path(folder) / step_name(step)).glob("part-*"))


def test_saved_state_comes_back(tmp_path):
    folder = str(tmp_path / "c")
    assert newest(folder) is None
    save(folder, 5)
    saved = newest(folder)
    assert holds(saved, 5)
    assert saved.state == state_of(5)
    assert saved.shapes() == SHAPES
    assert torch.equal(saved.read("qformer.a", "exp_avg", 3, 4), full(5)["qformer.a", "exp_avg"][3:7])


def test_part_is_plain_safetensors(tmp_path):
    save(str(tmp_path), 5)
    tensors = load_file(part_of(str(tmp_path), 5))
    assert torch.equal(tensors["exp_avg_sq/projection.b@0"], full(5)["projection.b", "exp_avg_sq"])


def test_same_state_gives_same_bytes(tmp_path):
    for name in ("one", "two"):
        save(str(tmp_path / name), 5)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / n / step_name(5)).iterdir()} for n in ("one", "two"))
    assert first == second


@pytest.mark.parametrize("writers", [1, 2, 3])
def test_digest_does_not_know_the_world_size(tmp_path, writers):
    parts = [Snapshot(fragments_of(4, rank, writers)) for rank in range(writers)]
    for rank, snapshot in enumerate(parts):
        snapshot.fill(fragments_of(4, rank, writers))
    store = ObjectStore()
    entries = []
    for rank, snapshot in enumerate(parts):
        data = bytes(snapshot.bytes())
        store.put(join(str(tmp_path), f"p{rank}"), data)
        entries.append(hash_file(f"p{rank}", [data]))
    saved = SavedCheckpoint(str(tmp_path), store, Manifest(4, 1, writers, tuple(entries), entries[0]))
    assert holds(saved, 4)
    expected = hashlib.sha256()
    for (name, kind), data in sorted(full(4).items()):
        expected.update(f"{name}\0{kind}\0".encode() + data.numpy().tobytes())
    assert saved.digest() == expected.hexdigest()


def test_damage_falls_back_and_says_so(tmp_path, caplog):
    folder = str(tmp_path)
    save(folder, 1, 2)
    data = bytearray(part_of(folder, 2).read_bytes())
    data[-1] ^= 1
    part_of(folder, 2).write_bytes(data)
    assert holds(newest(folder), 1)
    assert "DAMAGED" in caplog.text
    assert "sha256" in caplog.text


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_file_is_verified_by_one_rank_of_any_number(tmp_path, world_size):
    save(str(tmp_path), 1)
    files = [path for path in (tmp_path / step_name(1)).iterdir() if path.name.startswith(("part-", "state-"))]
    assert len(files) == 2
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + b"?")
        failed = 0
        for rank in range(world_size):
            checkpoints = manager(str(tmp_path), rank=Rank(rank, world_size))
            with closing(checkpoints):
                try:
                    checkpoints.latest()
                except CheckpointError:
                    failed += 1
        path.write_bytes(content)
        assert failed == 1, path.name


def test_missing_part_falls_back(tmp_path, caplog):
    save(str(tmp_path), 1, 2)
    part_of(str(tmp_path), 2).unlink()
    assert holds(newest(str(tmp_path)), 1)
    assert "is missing" in caplog.text


def test_nothing_intact_is_an_error_not_a_new_start(tmp_path):
    save(str(tmp_path), 1)
    part_of(str(tmp_path), 1).unlink()
    with pytest.raises(CheckpointError, match="none of 1 committed checkpoints is intact"):
        newest(str(tmp_path))


def test_damaged_step_can_be_saved_again(tmp_path):
    folder = str(tmp_path)
    save(folder, 1, 2)
    part_of(folder, 2).unlink()
    save(folder, 2)
    assert holds(newest(folder), 2)


def test_newer_format_is_refused_even_where_an_older_one_exists(tmp_path):
    save(str(tmp_path), 1, 2)
    path = tmp_path / step_name(2) / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))
    with pytest.raises(CheckpointError, match="format version 99"):
        newest(str(tmp_path))


def test_folder_without_manifest_does_not_exist(tmp_path):
    save(str(tmp_path), 1, 2)
    (tmp_path / step_name(2) / MANIFEST).unlink()
    (tmp_path / step_name(7)).mkdir()
    assert holds(newest(str(tmp_path)), 1)


def test_late_commit_of_an_earlier_owner_does_not_count(tmp_path):
    folder = str(tmp_path)
    save(folder, 10, token=1)
    save(folder, 15, token=2)
    save(folder, 20, token=1)
    assert [saved.step for saved in list_checkpoints(folder, ObjectStore())] == [15, 10]
    save(folder, 20, token=2)
    assert [saved.step for saved in list_checkpoints(folder, ObjectStore())][:2] == [20, 15]


def test_fenced_out_writer_cannot_commit(tmp_path):
    def assert_owner() -> None:
        raise LeaseError("held by another")

    checkpoints = manager(str(tmp_path), assert_owner=assert_owner)
    checkpoints.save(1, fragments_of(1), state_of(1))
    with pytest.raises(LeaseError):
        checkpoints.wait()
    checkpoints.close()
    assert not list(tmp_path.rglob(MANIFEST))


def test_earlier_owner_cannot_replace_a_later_one(tmp_path):
    save(str(tmp_path), 1, token=2)
    before = (tmp_path / step_name(1) / MANIFEST).read_bytes()
    checkpoints = manager(str(tmp_path), token=1)
    checkpoints.save(1, fragments_of(2), state_of(1))
    with pytest.raises(LeaseError, match="later owner"):
        checkpoints.wait()
    checkpoints.close()
    assert (tmp_path / step_name(1) / MANIFEST).read_bytes() == before


def test_failing_store_is_retried(tmp_path, caplog):
    store = FaultyStore(StoreConfig(), tmp_path / "journal", Fault("refuse", 0, num_writes=2))
    save(str(tmp_path / "c"), 1, store=store)
    assert holds(newest(str(tmp_path / "c")), 1)
    assert caplog.text.count("trying again") == 2


def test_saves_that_never_succeed_stop_the_run(tmp_path):
    store = FaultyStore(StoreConfig(), tmp_path / "journal", Fault("refuse", 0, num_writes=1000))
    checkpoints = manager(str(tmp_path / "c"), store, save_timeout_seconds=6.0)
    checkpoints.save(1, fragments_of(1), state_of(1))
    with pytest.raises(CheckpointError, match=r"no save of step 1 succeeded within 6 s.*503.*intact"):
        checkpoints.wait()
    with pytest.raises(CheckpointError):
        checkpoints.due(2, 0.1)
    checkpoints.close()


def test_place_that_cannot_be_written_leaves_the_last_good_one(tmp_path, one_try):
    save(str(tmp_path), 1)
    (tmp_path / step_name(2)).write_text("a file where the folder should be")
    checkpoints = manager(str(tmp_path))
    checkpoints.save(2, fragments_of(2), state_of(2))
    with pytest.raises(CheckpointError, match="step-000000002"):
        checkpoints.wait()
    checkpoints.close()
    (tmp_path / step_name(2)).unlink()
    assert holds(newest(str(tmp_path)), 1)


def test_folder_without_permission_to_write_is_one_clear_error(one_try):
    checkpoints = manager("/sys/isthmus")  # refused to root as well
    checkpoints.save(1, fragments_of(1), state_of(1))
    with pytest.raises(CheckpointError, match=r"/sys/isthmus.*([Pp]ermission denied|Read-only)"):
        checkpoints.wait()
    checkpoints.close()


def test_full_disk_is_one_clear_error_and_the_last_good_one_stays(tmp_path, one_try):
    """The uploading process may write no file of more than 100 bytes, which fails as a full disk does: in mid-write."""
    checkpoints = manager(str(tmp_path))
    checkpoints.save(1, fragments_of(1), state_of(1))
    checkpoints.wait()
    resource.prlimit(checkpoints._saver._uploader._process.pid, resource.RLIMIT_FSIZE, (100, 100))
    checkpoints.save(2, fragments_of(2), state_of(2))
    with pytest.raises(CheckpointError, match=r"no save of step 2 succeeded.*File too large.*intact"):
        checkpoints.wait()
    checkpoints.close()
    assert not list((tmp_path / step_name(2)).glob("part-*"))
    assert holds(newest(str(tmp_path)), 1)


def test_prepared_memory_is_the_one_that_is_used(tmp_path):
    checkpoints = manager(str(tmp_path))
    checkpoints.prepare(fragments_of(0))
    checkpoints._join_preparation()
    memory = checkpoints._saver._snapshot.memory
    checkpoints.save(1, fragments_of(1), state_of(1))
    checkpoints.wait()
    assert checkpoints._saver._snapshot.memory is memory
    checkpoints.close()
    assert holds(newest(str(tmp_path)), 1)


def test_snapshot_is_of_the_moment_of_the_save(tmp_path):
    checkpoints = manager(str(tmp_path))
    fragments = fragments_of(1)
    checkpoints.save(1, fragments, state_of(1))
    for fragment in fragments:
        fragment.data.zero_()
    checkpoints.wait()
    checkpoints.close()
    assert holds(newest(str(tmp_path)), 1)


def test_writer_process_dies_with_the_manager(tmp_path):
    checkpoints = manager(str(tmp_path))
    checkpoints.save(1, fragments_of(1), state_of(1))
    checkpoints.wait()
    process = checkpoints._saver._uploader._process
    assert process.poll() is None
    checkpoints.close()
    assert process.poll() is not None


def test_retention(tmp_path):
    folder = str(tmp_path)
    checkpoints = manager(folder, keep_every_steps=3, keep_best="eval/r1")
    for step in range(1, 7):
        metrics = {"eval/r1": 0.9 if step == 2 else 0.1}
        checkpoints.save(step, fragments_of(step), state_of(step, metrics=metrics))
        checkpoints.wait()
    checkpoints.close()
    assert [saved.step for saved in list_checkpoints(folder, ObjectStore())] == [6, 5, 3, 2]


def test_best_is_least_for_a_loss_and_earliest_of_equals():
    values = {1: {"loss": 2.0}, 2: {"loss": 1.0}, 3: {"loss": 1.0}, 4: {}}
    assert best_step(values, "loss") == 2
    assert best_step(values, "eval/r1") is None
    assert kept_steps(values, CheckpointConfig(keep_best="loss")) == {2, 3, 4}


def test_checkpoint_in_use_is_not_deleted(tmp_path):
    folder, store = str(tmp_path), ObjectStore()
    save(folder, 1)
    with newest(folder).in_use():
        save(folder, 2, 3, 4)
        assert holds(SavedCheckpoint.open(join(folder, step_name(1)), store), 1)
    save(folder, 5)
    assert [saved.step for saved in list_checkpoints(folder, store)] == [5, 4]


def test_leftovers_are_collected_but_never_those_of_a_later_step(tmp_path):
    folder, store = str(tmp_path), ObjectStore()
    save(folder, 4)
    crashed = [join(folder, step_name(step), "part-00000-of-00002-x.safetensors") for step in (3, 4, 5)]
    for url in crashed:
        store.put(url, b"half")
    _, dry = prune(folder, store, CheckpointConfig(), dry_run=True)
    assert dry == crashed[:2]
    prune(folder, store, CheckpointConfig())
    assert [Path(url).exists() for url in crashed] == [False, False, True]
    assert holds(newest(folder), 4)


def test_a_writer_that_lost_the_run_collects_nothing_of_its_successor(tmp_path, caplog):
    """Found by the simulator: it commits late, and took the parts of its successor's save for leftovers."""
    folder, calls = str(tmp_path), []
    save(folder, 2)
    part = tmp_path / step_name(4) / "part-00000-of-00001-of-the-successor.safetensors"

    def assert_owner() -> None:
        calls.append(part.exists())
        if len(calls) > 1:
            raise LeaseError("held by another")
        part.parent.mkdir()
        part.write_text("uploaded, to be committed next")

    checkpoints = manager(folder, assert_owner=assert_owner, keep_last=2)
    checkpoints.save(6, fragments_of(6), state_of(6))
    checkpoints.wait()
    checkpoints.close()
    assert part.exists()
    assert calls == [False, True]
    assert "held by another" in caplog.text


def test_a_manifest_that_arrives_after_its_files_were_deleted_does_not_end_retention(tmp_path):
    """Found by the simulator: its state cannot be read, and then nothing was deleted any more."""
    folder = str(tmp_path)
    save(folder, 1, 2)
    late = (tmp_path / step_name(1) / MANIFEST).read_bytes()
    save(folder, 3, 4)
    (tmp_path / step_name(1) / MANIFEST).write_bytes(late)
    save(folder, 5, 6)
    assert [saved.step for saved in list_checkpoints(folder, ObjectStore())] == [6, 5]
    assert not (tmp_path / step_name(1) / MANIFEST).exists()


def test_a_save_that_hangs_is_tried_again_by_the_next_attempt(tmp_path, monkeypatch):
    """As after a machine was suspended for longer than the limit: nothing for the operator to correct."""
    monkeypatch.setattr(commit, "SLACK_SECONDS", 0.0)
    checkpoints = manager(str(tmp_path), save_timeout_seconds=0.01)
    hanging = threading.Event()
    checkpoints._saver._thread = threading.Thread(target=hanging.wait)
    checkpoints._saver._thread.start()
    with pytest.raises(CheckpointError, match="still hangs") as caught:
        checkpoints.wait()
    assert caught.value.retryable
    hanging.set()
    checkpoints.close()


def test_a_close_ends_the_wait_for_a_lost_rank_at_once(tmp_path, monkeypatch):
    """A process whose save waits longer for a dead peer is not kept for the next attempt."""
    monkeypatch.setattr(commit, "POLL_SECONDS", 60.0)
    asked, get = threading.Event(), ObjectStore.get

    def note(store, url):
        if "uploaded-" in url:
            asked.set()
        return get(store, url)

    monkeypatch.setattr(ObjectStore, "get", note)
    before = set(threading.enumerate())
    checkpoints = manager(str(tmp_path), rank=Rank(0, 2))
    checkpoints.save(1, fragments_of(1, 0, 2), state_of(1))
    assert asked.wait(60)
    time.sleep(0.5)  # until it waits for the next try
    checkpoints.close()
    assert not [thread for thread in set(threading.enumerate()) - before if thread.is_alive()]


def test_a_close_does_not_wait_for_an_upload_that_hangs(tmp_path):
    """A process that does would be replaced, although it lost nothing."""
    before = set(threading.enumerate())
    checkpoints = manager(str(tmp_path))
    checkpoints.prepare(fragments_of(1))
    checkpoints._join_preparation()
    uploader = checkpoints._saver._uploader._process
    os.kill(uploader.pid, signal.SIGSTOP)
    checkpoints.save(1, fragments_of(1), state_of(1))
    began = time.monotonic()
    checkpoints.close()
    assert time.monotonic() - began < 20, "the limit of a save is far away"
    assert uploader.poll() is not None
    assert not [thread for thread in set(threading.enumerate()) - before if thread.is_alive()]


def test_an_outage_while_a_header_is_read_is_no_damage(tmp_path, monkeypatch):
    save(str(tmp_path), 1)
    saved = newest(str(tmp_path))

    def refuse(url, *_args, **_kwargs):
        raise UnavailableError(f"{url}: 503 on purpose")

    monkeypatch.setattr(saved._store, "get_range", refuse)
    with pytest.raises(UnavailableError):
        saved.shapes()
    saved.close()


def test_interval():
    by_steps = Interval(CheckpointConfig(every_steps=4), 86400)
    assert [step for step in range(1, 10) if by_steps.due(step, 1e6)] == [4, 8]
    by_time = Interval(CheckpointConfig(every_minutes=0.5), 86400)
    assert [step for step in range(1, 5) if by_time.due(step, 10.0)] == [3, 4]
    by_time.saved(None)
    assert not by_time.due(5, 10.0)
    assert young_daly_seconds(2.0, 3600.0) == pytest.approx(120.0)
    automatic = Interval(CheckpointConfig(), 3600.0)
    automatic.saved(0.5)
    assert automatic.wanted_seconds == pytest.approx(60.0)


class CountingStore(ObjectStore):
    """Notes the bytes of every ranged read."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[int] = []

    def get_range(self, url, start, length, *, etag=None, into=None):
        self.read.append(length)
        return super().get_range(url, start, length, etag=etag, into=into)


def test_shapes_cost_one_short_read_a_part(tmp_path, monkeypatch):
    """Not the parts themselves: at 64 ranks each rank would otherwise read the whole checkpoint at every restore."""
    monkeypatch.setattr("isthmus.trainer.safetensors_header.FIRST_READ_BYTES", 1024)
    values = torch.zeros(1 << 20)
    store, parts = CountingStore(), []
    for number in range(8):
        snapshot = Snapshot([Fragment(f"t{number}", "param", (1 << 20,), 0, values)])
        store.put(join(str(tmp_path), f"p{number}"), snapshot.bytes())
        parts.append(hash_file(f"p{number}", [bytes(snapshot.bytes())]))
    saved = SavedCheckpoint(str(tmp_path), store, Manifest(1, 1, 8, tuple(parts), parts[0]))
    assert len(saved.shapes()) == 8
    assert store.read == [1024] * 8
    saved.close()


def test_a_restore_takes_the_bytes_that_were_verified(tmp_path, monkeypatch):
    """A large part is read from the store once; what is written over it in the meantime is not restored."""
    monkeypatch.setattr("isthmus.trainer.checkpoint.reader.HASH_BLOCK_BYTES", 32)
    save(str(tmp_path), 1)
    checkpoints = manager(str(tmp_path))
    with closing(checkpoints), closing(checkpoints.latest()) as saved:
        assert saved.shapes() == SHAPES  # a header is read by itself
        part = part_of(str(tmp_path), 1)
        part.write_bytes(bytes(part.stat().st_size))
        assert holds(saved, 1)


def test_a_read_at_one_place_fetches_one_block_and_a_long_one_reads_ahead(tmp_path, monkeypatch):
    monkeypatch.setattr("isthmus.trainer.checkpoint.reader.HASH_BLOCK_BYTES", 1 << 12)
    (tmp_path / "part").write_bytes(bytes(range(256)) * 256)
    store, pool = CountingStore(), ThreadPoolExecutor(1)
    reader = BlockReader(store, str(tmp_path / "part"), 1 << 16, pool)
    target = memoryview(bytearray(100))
    reader.read_into(5 << 12, target)
    reader.read_into((5 << 12) + 200, target)
    assert (len(store.read), bytes(target)) == (1, bytes((200 + i) % 256 for i in range(100)))
    reader.read_into(6 << 12, target)
    pool.shutdown()
    assert len(store.read) == 1 + 1 + _BLOCKS_AHEAD


def test_state_of_another_release_is_read(tmp_path, caplog):
    """A field that an older release did not write has its default; one of a newer release is ignored and named."""
    raw = state_of(5, metrics={"loss": 1.0}).as_json()
    assert TrainState.from_json({k: v for k, v in raw.items() if k != "metrics"}, "url") == state_of(5)
    with caplog.at_level("INFO"):
        assert TrainState.from_json({**raw, "tokens_seen": 7}, "url") == state_of(5, metrics={"loss": 1.0})
    assert "tokens_seen" in caplog.text
    for damaged in ({k: v for k, v in raw.items() if k != "step"}, {**raw, "step": "5"}):
        with pytest.raises(CheckpointError, match=r"url.*damaged"):
            TrainState.from_json(damaged, "url")


def test_an_outage_at_a_restore_is_no_damage_and_no_error_of_the_user(tmp_path, monkeypatch):
    """A damaged checkpoint is skipped; one that cannot be read now must be neither skipped nor the end of the run."""
    save(str(tmp_path), 1, 2)
    checkpoints = manager(str(tmp_path))

    def refuse(url, *_args, **_kwargs):
        raise UnavailableError(f"{url}: 503 on purpose")

    monkeypatch.setattr(checkpoints._store, "get_range", refuse)
    with pytest.raises(CheckpointError, match="cannot be read to verify it") as caught:
        checkpoints.latest()
    assert caught.value.retryable
    checkpoints.close()
