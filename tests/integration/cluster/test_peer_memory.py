"""Replicas over two raylets: a run that lost a process or a node resumes from a replica, not from a checkpoint."""

import json
import os
import signal
import threading

import pytest

from isthmus.cluster.status import StatusBoard
from isthmus.cluster.supervision.supervisor import Supervisor
from isthmus.data_pipeline.store.object_store import ObjectStore
from tests.integration.cluster.raylets import Raylets, wait_for
from tests.unit.cluster.configs import job_config

pytestmark = pytest.mark.integration
LIMIT = 90.0
EVERY = 4


@pytest.fixture
def raylets():
    raylets = Raylets(2)
    raylets.connect("demo")
    yield raylets
    raylets.close()


def starts(folder, rank=0):
    path = folder / f"starts-{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_until_past(board, start):
    def past():  # until a restart has recovered, the step shown may still be that of the attempt before
        recovered = all(restart.recovery_seconds is not None for restart in board.status.restarts)
        return recovered and board.status.step > start + 3 * EVERY

    wait_for(past, LIMIT, f"steps beyond {start}: {board.status}")


def test_a_lost_process_and_a_lost_node_cost_a_few_steps(raylets, tmp_path):

    config = job_config(
        str(tmp_path),
        stage1={"steps": 10**6, "global_batch_size": 8, "micro_batch_size": 4, "deepspeed": "zero1"},
        cluster={"workers": {"min": 1, "max": 2}},
        checkpoint={"every_steps": 10**6, "peer_memory_every_steps": EVERY},
    )
    board = StatusBoard(str(tmp_path / "demo"), ObjectStore(), "demo", "job-1")
    supervisor = Supervisor(config, None, board, entry="tests.integration.cluster.held_rank")
    thread = threading.Thread(target=supervisor.run_stage, args=("stage1",), daemon=True)
    thread.start()
    try:
        wait_for(lambda: starts(tmp_path, 1), LIMIT, "the first start")
        wait_until_past(board, 0)
        os.kill(starts(tmp_path, 1)[0]["pid"], signal.SIGKILL)
        wait_for(lambda: len(starts(tmp_path)) == 2, LIMIT, "a start after the death of a process")
        wait_until_past(board, starts(tmp_path)[1]["step"])
        raylets.remove(raylets.node_of(0))
        wait_for(lambda: len(starts(tmp_path)) == 3, LIMIT, "a start after the loss of a node")
        wait_until_past(board, starts(tmp_path)[2]["step"])
    finally:
        supervisor.request_stop()
        thread.join(LIMIT)
    assert not thread.is_alive()
    first, second, third = starts(tmp_path)
    assert [start["world"] for start in (first, second, third)] == [2, 2, 1]
    assert 0 == first["step"] < second["step"] < third["step"]
    assert all(start["whole"] for start in (first, second, third))
    assert all(start["url"].startswith("peers:") for start in (second, third))
    for restart, start in zip(board.status.restarts, (second, third), strict=True):
        assert restart.step - start["step"] <= 2 * EVERY
    assert not (tmp_path / "checkpoints").exists()
