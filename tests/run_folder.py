"""A small run folder made by the product's own writers, for tests of what reads it."""

from pathlib import Path

import numpy as np

from isthmus.cluster.config import JobConfig
from isthmus.cluster.status import Restart, RunState, StatusBoard
from isthmus.data_pipeline.store.object_store import ObjectStore, join
from isthmus.trainer.evaluation.result import EvalResult, Example, Examples, thumbnail
from isthmus.trainer.monitoring.goodput import GOODPUT_NAME, Activity, GoodputLedger
from isthmus.trainer.monitoring.loggers import JsonlLogger
from isthmus.trainer.monitoring.samples import write_samples
from isthmus.trainer.monitoring.synced_folder import SyncedFolder
from isthmus.trainer.runs.store import RunStore
from tests.unit.cluster.configs import job_config

BATCH = 8
HOSTILE = "</td><script>document.title='taken'; console.error('run')</script>"
CAPTIONS = ("a large red cross", "a small blue ring", HOSTILE, "a green star", "a green star")


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


def write_run(url: str, store: ObjectStore) -> JobConfig:
    """Write a finished run of both stages with one restart in stage 1; return its configuration."""
    stage2 = {"steps": 20, "global_batch_size": BATCH, "micro_batch_size": 4, "deepspeed": "stage2_zero3"}
    model = {"vision": {"path": "absent/vision"}, "language": {"path": "absent/language"}}
    config = job_config(url=url, stage2=stage2, model=model, evaluation={"manifest": "s3://bucket/held-out"})
    run = RunStore.open(config, store, owner="a test")
    board = StatusBoard(run.url, store, config.run.name, None)
    _stage1(run.stage_url("stage1"), store)
    _restart(board)
    _stage2(run.stage_url("stage2"), store)
    _goodput(run.url, store)
    board.update(RunState.FINISHED, message="", stage="stage2", step=20, num_steps=20, world_size=2)
    run.close()
    return config


def _stage1(url: str, store: ObjectStore) -> None:
    synced = SyncedFolder(url, store)
    sink = JsonlLogger(synced, 0, BATCH)
    for step in range(5, 41, 5):
        losses = {f"loss/{name}": weight / step**0.5 for name, weight in (("total", 9), ("itc", 4), ("itm", 1))}
        sink.log(step, {**losses, "memory/gigabytes": 1.2 + step / 100})
    recalls = {f"{way}_r{k}": k / 12 for way in ("i2t", "t2i") for k in (1, 5, 10)}
    sink.log(40, {f"eval/{name}": v for name, v in recalls.items()})
    sink.close()
    texts = [{"key": f"k{i}", "caption": text, "retrieved": CAPTIONS[0]} for i, text in enumerate(CAPTIONS)]
    examples = Examples([Example(i, [i, 0], [0, i]) for i in range(4)], {i: thumbnail(shade(i)) for i in range(4)})
    write_samples(synced, 40, EvalResult({}, {"attention": shade(5), "similarity": shade(6)}, texts, examples))
    synced.close()


def _stage2(url: str, store: ObjectStore) -> None:
    synced = SyncedFolder(url, store)
    sink = JsonlLogger(synced, 0, BATCH)
    sink.log(0, {"eval/loss": 9.5, "eval/loss_wrong_image": 9.25})
    for step in range(5, 21, 5):
        sink.log(step, {"loss/total": 5 - step / 10, "loss/lm": 5 - step / 10})
    sink.log(
        20,
        {"eval/cider_d": 1.5, "eval/exact": 0.4, "eval/loss": 2.0, "eval/loss_wrong_image": 3.25},
    )
    sink.close()
    answers = (CAPTIONS[0], "something else", HOSTILE, "a red star", "a blue star")
    texts = [{"key": f"k{i}", "caption": CAPTIONS[i], "generated": answers[i]} for i in range(5)]
    examples = Examples([Example(i) for i in range(5)], {i: thumbnail(shade(i)) for i in range(5)})
    write_samples(synced, 20, EvalResult({}, {"attention": shade(7)}, texts, examples))
    synced.close()


def _restart(board: StatusBoard) -> None:
    cause = f"worker train-1 was killed by signal 9 {HOSTILE}"
    board.add_restart(Restart(at=1e9, kind="worker", cause=cause, stage="stage1", step=24, world_size=2))
    board.complete_restart(4, 12.5, {"clear": 0.5, "start": 12.0})


def _goodput(url: str, store: ObjectStore) -> None:
    clock = Clock()
    ledger = GoodputLedger(None, lambda data: store.put(join(url, GOODPUT_NAME), data), clock=clock)
    for activity, seconds in ((Activity.COMPUTE, 80.0), (Activity.DATA_WAIT, 5.0), (Activity.EVALUATION, 15.0)):
        with ledger.spending(activity):
            clock.now += seconds
    ledger.write()


def shade(number: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    """Return a plain picture."""
    picture: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = np.full((40, 60, 3), 30 * number, dtype=np.uint8)
    return picture


def local_run(folder: Path) -> tuple[JobConfig, str]:
    """Write a run below a local folder; return its configuration and its URL."""
    config = write_run(str(folder), ObjectStore())
    return config, join(str(folder), config.run.name)
