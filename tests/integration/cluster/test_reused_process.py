"""A process that trains again after a failed attempt kept nothing of it: clean by its own account, and equal bits."""

import datetime
import itertools
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from isthmus.cluster.config import JobConfig
from isthmus.cluster.failures import FailureKind
from isthmus.cluster.workers.actor import Assignment, TrainWorker, WorkerResult
from isthmus.cluster.workers.rendezvous import Rendezvous
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.trainer.checkpoint.reader import scan
from isthmus.trainer.config.loading import load_config
from isthmus.trainer.context import Rank
from isthmus.trainer.engine.engine import Engine
from isthmus.trainer.runs.store import RunStore
from tests.integration.cluster.raylets import ROOT
from tests.ranks import run_ranks

pytestmark = pytest.mark.integration
WORLD_SIZE, STEPS, FAILS_AT = 2, 6, 3


def recipe(assets: Path, folder: Path, name: str, stage: str) -> JobConfig:
    """Return one stage of the tiny recipe with dropout, saved every two steps."""
    overrides = [
        f"run.url={folder}",
        f"run.name={name}",
        "evaluation.manifest=null",
        f"data.sources.0.manifest={assets}/train",
        f"model.vision.path={assets}/vision",
        f"model.qformer.tokenizer={assets}/bert",
        "model.qformer.dropout=0.1",
        f"{stage}.steps={STEPS}",
        "checkpoint.every_steps=2",
        *(["stage2=null", "model.language=null"] if stage == "stage1" else ["stage1=null", "stage2.init_from=random"]),
    ]
    if stage == "stage2":
        overrides.append(f"model.language.path={assets}/opt")
    return load_config(ROOT / "recipes" / "tiny.yaml", overrides, JobConfig)


def fail_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this rank fail in the middle of a step: gradients are there, and their reduction is still to come."""
    step, calls = Engine.step, itertools.count()

    def failing(self, lr):
        if next(calls) == FAILS_AT:
            raise RuntimeError("planted")
        return step(self, lr)

    monkeypatch.setattr(Engine, "step", failing)


def meet(folder: Path, worker: TrainWorker, rank: int, number: int) -> tuple[str, int]:
    """Return the address of rank 0's port, told by a file."""
    told = folder / f"port-{number}"
    if rank == 0:
        worker._rendezvous = Rendezvous("127.0.0.1")
        told.with_suffix(".new").write_text(str(worker._rendezvous.address[1]))
        told.with_suffix(".new").rename(told)
    while not told.exists():
        time.sleep(0.01)
    return "127.0.0.1", int(told.read_text())


def attempts(
    rank: int, world_size: int, config: JobConfig, token: int, folder: Path, fails: bool
) -> list[WorkerResult]:
    """Run a stage in this process, after an attempt that fails if `fails`; what each left behind must be nothing."""
    dist.destroy_process_group()  # the tests' own
    worker = TrainWorker(f"train-{rank}", config.run.name, on_cpu=True)
    place = Rank(rank, world_size, rank)
    results = []
    for number in range(2 if fails else 1):
        assignment = Assignment(config, config.stages[0], meet(folder, worker, rank, number), token)
        with pytest.MonkeyPatch.context() as monkeypatch:
            if fails and number == 0:
                fail_once(monkeypatch)
            results.append(worker.run(assignment, place, None))
        assert worker.release() == []
    dist.init_process_group(
        "gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=datetime.timedelta(seconds=60)
    )  # for the tests' own end
    return results


def train(assets: Path, folder: Path, name: str, stage: str, *, fails: bool) -> tuple[list[WorkerResult], list[str]]:
    """Return how rank 0's attempts ended, and the hashes of the last checkpoint's parts."""
    config = recipe(assets, folder, name, stage)
    run = RunStore.open(config, ObjectStore(), owner="the test")
    place = folder / f"meet-{name}"
    place.mkdir()
    results, _ = run_ranks(attempts, WORLD_SIZE, config, run.token, place, fails, timeout_seconds=240)
    found, _ = scan(run.checkpoints_url(stage), ObjectStore())
    newest = max(found, key=lambda saved: saved.step)
    run.close()
    assert newest.step == STEPS
    return results, [part.sha256 for part in newest.manifest.parts]


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_an_attempt_after_a_failed_one_in_the_same_processes_ends_with_the_same_bits(assets, tmp_path, stage):
    _, undisturbed = train(assets, tmp_path, "undisturbed", stage, fails=False)
    results, disturbed = train(assets, tmp_path, "disturbed", stage, fails=True)
    assert results[0].failure.kind is FailureKind.ERROR
    assert results[0].step == FAILS_AT
    assert results[1].outcome == "finished"
    assert "memory probe" in results[0].progress.start_seconds
    assert disturbed == undisturbed
