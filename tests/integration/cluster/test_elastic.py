"""The real training on raylets that come and go: the world shrinks and grows, and the weights have the same bits.

Readers are Ray actors, and a worker with its reader fills a node exactly, so growth has no CPU to spare.
"""

import threading

import pytest

from isthmus.cluster.config import JobConfig
from isthmus.cluster.status import StatusBoard
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.trainer.checkpoint.reader import list_checkpoints
from isthmus.trainer.config.loading import load_config
from isthmus.trainer.context import LocalContext, StopReason
from isthmus.trainer.monitoring.segments import read_records
from isthmus.trainer.run_local import train_here
from isthmus.trainer.runs.store import RunStore
from tests.integration.cluster.raylets import ROOT, Raylets, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]
LIMIT = 180.0
ENDLESS = 100_000
STEPS_IN_EACH_WORLD = 10


@pytest.fixture
def raylets():
    raylets = Raylets(2, num_cpus=2)
    raylets.connect("tiny")
    yield raylets
    raylets.close()


def recipe(assets, folder, name, *more):
    overrides = [
        f"run.name={name}",
        f"run.url={folder}",
        f"data.sources.0.manifest={assets}/train",
        f"model.vision.path={assets}/vision",
        f"model.qformer.tokenizer={assets}/bert",
        "data.backend=ray",
        "data.readers=1",
        "model.language=null",
        "stage2=null",
        f"stage1.steps={ENDLESS}",
        "stage1.global_batch_size=8",
        "stage1.micro_batch_size=4",
        "stage1.optimizer.warmup_steps=1000",
        "checkpoint.every_steps=5",
        "logging.every_steps=1",
        "evaluation.manifest=null",
        "cluster.workers={min: 1, max: 4}",
        "run.virtual_ranks=4",
        "model.qformer.dropout=0.1",
        "cluster.grow_after_seconds=1",
        *more,
    ]
    return load_config(ROOT / "recipes" / "tiny.yaml", overrides, JobConfig)


class StopAt(LocalContext):
    """A process alone that is asked to stop at a step."""

    def __init__(self, step):
        super().__init__()
        self._last, self._step = step - 1, 0

    def begin_step(self, step):
        self._step = step

    def stop_request(self):
        return StopReason.SIGNAL if self._step >= self._last else None


def losses(folder, name):
    records = read_records(str(folder / name / "stage1"), "metrics", ObjectStore())
    return [(record["step"], record["loss/total"]) for record in records if "loss/total" in record]


def state(folder, name):
    saved = list_checkpoints(str(folder / name / "stage1/checkpoints"), ObjectStore())[0]
    return saved.step, saved.digest()


def wait_for_steps(board, world_size):
    """Wait until a group of that size has done some steps since it began."""

    def settled():
        status = board.status
        return status.step if status.world_size == world_size and status.state == "running" else None

    first = wait_for(settled, LIMIT, f"a world of {world_size}: {board.status}")
    wait_for(lambda: (settled() or 0) >= first + STEPS_IN_EACH_WORLD, LIMIT, f"steps: {board.status}")


def test_the_world_shrinks_and_grows_and_ends_with_the_bits_of_one_process(raylets, assets, tmp_path):
    from isthmus.cluster.supervision.supervisor import Supervisor

    config = recipe(assets, tmp_path, "elastic")
    run = RunStore.open(config, ObjectStore(), owner="test")
    board = StatusBoard(str(tmp_path / "elastic"), ObjectStore(), "elastic", None)
    supervisor = Supervisor(config, run.token, board)
    thread = threading.Thread(target=supervisor.run_stage, args=("stage1",), daemon=True)
    thread.start()
    try:
        wait_for_steps(board, 2)
        raylets.remove(raylets.node_of(1))
        wait_for_steps(board, 1)
        raylets.add()
        wait_for_steps(board, 2)
        for _ in range(2):
            raylets.add()
        wait_for_steps(board, 4)
    finally:
        supervisor.request_stop()
        thread.join(LIMIT)
        run.close()
    assert not thread.is_alive()
    assert [restart.kind for restart in board.status.restarts] == ["lost process", "resize", "resize"]
    assert [restart.lost_steps for restart in board.status.restarts[1:]] == [0, 0]
    kept = [restart.processes["kept"] for restart in board.status.restarts[1:]]  # the lost node may have run both
    assert kept == [1, 2], "growing restarted processes that were running"
    trained = losses(tmp_path, "elastic")
    end = board.status.step
    assert [step for step, _ in trained] == list(range(1, end + 1))

    train_here(recipe(assets, tmp_path, "alone", "data.backend=process", "data.readers=0"), StopAt(end))
    assert losses(tmp_path, "alone") == trained
    assert state(tmp_path, "alone") == state(tmp_path, "elastic")
    assert state(tmp_path, "alone")[0] == end
