"""Records land in the run folder, local or remote, and a resumed run continues without gaps or doubled steps."""

import itertools
from types import SimpleNamespace

import boto3
import numpy as np
import pytest
from moto import mock_aws
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from isthmus.data_pipeline.config import StoreConfig
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.trainer.monitoring import loggers as metrics
from isthmus.trainer.monitoring.loggers import JsonlLogger, TensorBoardLogger
from isthmus.trainer.monitoring.segments import SegmentedLog, read_records
from isthmus.trainer.monitoring.synced_folder import SyncedFolder

pytestmark = pytest.mark.unit
BATCH = 4


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path, monkeypatch):
    """A stage folder and a store: local, or S3 in this process."""
    if request.param == "local":
        yield str(tmp_path / "run" / "stage1"), ObjectStore()
        return
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    with mock_aws():
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="bucket")
        yield "s3://bucket/run/stage1", ObjectStore(StoreConfig(region="us-east-1"))


@pytest.fixture(autouse=True)
def _clock(monkeypatch):
    """Event files are ordered by the second of their start: let every look at the clock be a second later."""
    seconds = itertools.count(1_800_000_000)
    monkeypatch.setattr(event_file_writer, "time", SimpleNamespace(time=lambda: next(seconds)))


def write_steps(synced, first, last, *, killed=False, checkpoint_at=None, resumed=0, flush_every_step=False):
    """Write a record for each step, push at the checkpoint, and end cleanly or not at all."""
    sinks = [JsonlLogger(synced, resumed or -1, BATCH), TensorBoardLogger(synced, resumed or -1)]
    for step in range(first, last + 1):
        for sink in sinks:
            sink.log(step, {"loss/total": 1.0 / step, "optim/lr": step / 10})
        if flush_every_step or step == checkpoint_at or (killed and step == last):
            for sink in sinks:
                sink.flush()
                if step == checkpoint_at:
                    sink.end_segment()
                else:
                    sink.send()
            synced.wait()
    if not killed:
        for sink in sinks:
            sink.close()
        synced.close()


def read_back(url, store, folder):
    """Return the JSONL records and TensorBoard's view, as a reader of the run folder gets them."""
    folder.mkdir(parents=True)
    for info in store.list(url):
        local = folder / info.url.removeprefix(url).lstrip("/")
        local.parent.mkdir(parents=True, exist_ok=True)
        local.write_bytes(store.get(info.url))
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return read_records(str(folder), "metrics", ObjectStore()), events


def test_a_run_that_is_never_killed(place, tmp_path):
    url, store = place
    write_steps(SyncedFolder(url, store), 1, 8)
    records, events = read_back(url, store, tmp_path / "copy")
    assert [record["step"] for record in records] == list(range(1, 9))
    assert records[3]["samples"] == 16
    assert records[3]["loss/total"] == 0.25
    assert [event.step for event in events.Scalars("loss/total")] == list(range(1, 9))


@pytest.mark.parametrize("resumed", [0, 3, 5, 7])
def test_steps_done_again_are_there_once(place, tmp_path, resumed):
    url, store = place
    write_steps(SyncedFolder(url, store), 1, 5, killed=True, checkpoint_at=3)
    write_steps(SyncedFolder(url, store), 4, 7, killed=True, resumed=3)
    write_steps(SyncedFolder(url, store), resumed + 1, 10, resumed=resumed)
    records, events = read_back(url, store, tmp_path / "copy")
    assert [record["step"] for record in records] == list(range(1, 11))
    assert [event.step for event in events.Scalars("loss/total")] == list(range(1, 11))


def test_many_small_event_files_resume_too(place, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "MAX_EVENT_FILE_BYTES", 300)
    url, store = place
    write_steps(SyncedFolder(url, store), 1, 20, killed=True, flush_every_step=True)
    assert len([info for info in store.list(url) if "tfevents" in info.url]) > 3
    write_steps(SyncedFolder(url, store), 12, 20, resumed=11)
    _, events = read_back(url, store, tmp_path / "copy")
    assert [event.step for event in events.Scalars("loss/total")] == list(range(1, 21))


def test_records_of_releases_before_segments_are_continued(tmp_path):
    """Their one file is cut once, without the line that a kill has truncated, and read before the segments."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "samples": 4}\n{"step": 3, "samples": 12}\n{"step": 4, "sam')
    sink = JsonlLogger(SyncedFolder(str(tmp_path), ObjectStore()), 2, 4)
    sink.log(3, {"loss/total": float("nan")})
    sink.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "samples": 4}\n'
    records = read_records(str(tmp_path), "metrics", ObjectStore())
    assert [record["step"] for record in records] == [1, 3]
    assert records[1]["loss/total"] is None


def test_pictures_land_in_tensorboard(place, tmp_path):
    url, store = place
    synced = SyncedFolder(url, store)
    sinks = [JsonlLogger(synced, -1, BATCH), TensorBoardLogger(synced, -1)]
    for sink in sinks:
        sink.log_pictures(1, {"samples": np.zeros((8, 6, 3), dtype=np.uint8)})
        sink.close()
    synced.close()
    _, events = read_back(url, store, tmp_path / "copy")
    (image,) = events.Images("samples")
    assert (image.height, image.width, image.step) == (8, 6, 1)


def test_a_segment_ends_after_five_minutes_or_at_256_kib(tmp_path):
    """Under the names that docs/operators.md gives: the step of the first record."""
    now = [0.0]
    synced = SyncedFolder(str(tmp_path / "stage1"), ObjectStore())
    log = SegmentedLog(synced, "metrics", -1, clock=lambda: now[0])
    for step, seconds, text in ((1, 300.0, "x"), (2, 300.5, "x"), (3, 301.0, "x" * (256 << 10)), (4, 302.0, "x")):
        now[0] = seconds if step > 1 else 0.0
        log.append(step, {"text": text})
        now[0] = seconds
        log.flush()
    log.end_segment()
    synced.close()
    names = sorted(path.name for path in (tmp_path / "stage1" / "metrics").iterdir())
    assert names == ["000000001.00.jsonl", "000000003.00.jsonl", "000000004.00.jsonl"]
