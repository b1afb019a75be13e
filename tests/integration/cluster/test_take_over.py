"""After the loss of a process the others and a spare run the next attempt; what is not fit for it is started anew."""

import os
import signal
import time

import psutil
import pytest
import ray

from isthmus.cluster.supervision.processes import end_processes
from isthmus.cluster.supervision.spares import Spares
from tests.integration.cluster.raylets import wait_for
from tests.integration.cluster.supervised import LIMIT, Supervised
from tests.unit.cluster.configs import job_config

pytestmark = pytest.mark.integration
ENTRY = "tests.integration.cluster.toy_rank"


@pytest.fixture
def run(tmp_path):
    """A run with a spare on each node, which is stopped at the end and must leave no process."""
    run = Supervised(tmp_path, spares=1, steps=100_000)
    wait_for(lambda: run.board.status.spares == 2, LIMIT, f"spares: {run.board.status}")
    yield run
    run.stop()
    wait_for(lambda: not pids("train-") | pids("spare-"), 20, f"the end of {pids('train-')} and {pids('spare-')}")


def pids(title):
    """Return the processes of the run that Ray shows under this title."""
    processes = psutil.process_iter(["cmdline", "environ", "status"])
    return {
        process.pid
        for process in processes
        if (process.info["cmdline"] or [""])[0].startswith(f"ray::{title}")
        and (process.info["environ"] or {}).get("RAY_TMPDIR") == os.environ.get("RAY_TMPDIR")
        and process.info["status"] != psutil.STATUS_ZOMBIE
    }


def kill(run, rank, *, num_restarts=1):
    """Kill a rank, wait until the run has recovered, and return where the processes of the new attempt came from."""
    os.kill(run.pid(rank), signal.SIGKILL)
    run.wait_until_recovered(num_restarts)
    return run.board.status.restarts[-1].processes


@pytest.mark.parametrize("rank", [0, 1])
def test_the_survivor_stays_and_a_spare_takes_the_place_of_the_lost_process(raylets, run, rank):
    before, spares = [run.pid(0), run.pid(1)], pids("spare-")
    assert kill(run, rank) == {"kept": 1, "spare": 1, "new": 0}
    assert run.pid(1 - rank) == before[1 - rank]
    assert run.pid(rank) in spares
    assert pids(f"train-{rank}") == {run.pid(rank)}, "the name under which drain.py waits for it"
    wait_for(lambda: run.board.status.spares == 2, LIMIT, "a new spare")
    assert not spares <= pids("spare-")


def test_a_node_that_lost_many_processes_keeps_the_others_where_the_other_nodes_do_not_suffice(raylets, tmp_path):
    run = Supervised(tmp_path, steps=100_000, workers={"min": 2, "max": 2})
    try:
        for number in range(1, 4):
            saved = run.board.status.committed_step or 0
            wait_for(lambda saved=saved: (run.board.status.committed_step or 0) > saved, LIMIT, "a checkpoint")
            assert kill(run, 1, num_restarts=number)["kept"] == 1
    finally:
        run.stop()


def test_a_dead_spare_is_skipped_counted_and_replaced_by_a_new_process(raylets, run):
    for pid in pids("spare-"):
        os.kill(pid, signal.SIGKILL)
    assert kill(run, 1) == {"kept": 1, "spare": 0, "new": 1}
    wait_for(lambda: run.board.status.lost_spares == 2, LIMIT, "the count")
    assert run.board.status.spares == 0


def test_a_stopped_spare_is_given_up_within_its_limit(raylets, run):
    for pid in pids("spare-"):
        os.kill(pid, signal.SIGSTOP)
    assert kill(run, 1) == {"kept": 1, "spare": 0, "new": 1}
    assert run.board.status.lost_spares == 1


def test_a_process_that_keeps_something_of_its_attempt_is_replaced(raylets, tmp_path):
    (tmp_path / "leave-a-thread").touch()
    run = Supervised(tmp_path, spares=0, steps=100_000)
    try:
        run.wait_for_step(6)
        assert kill(run, 1) == {"kept": 0, "spare": 0, "new": 2}
    finally:
        run.stop()


def test_after_a_second_failure_without_a_commit_all_processes_are_new(raylets, tmp_path):
    (tmp_path / "no-commits").touch()
    run = Supervised(tmp_path, spares=0, steps=100_000, restart={"backoff_seconds": 0.1})
    try:
        run.wait_for_step(6)
        survivor = run.pid(0)
        assert kill(run, 1) == {"kept": 1, "spare": 0, "new": 1}
        assert kill(run, 1, num_restarts=2) == {}
        assert run.pid(0) != survivor
    finally:
        run.stop()


def test_a_node_that_the_group_leaves_gives_up_its_spares(raylets):
    spares = Spares(job_config(cluster={"spares": 1}), ENTRY)
    here, there = (node.node_id for node in raylets.nodes)
    try:
        spares.keep({here, there})
        wait_for(lambda: spares.num_ready == 2, LIMIT, "spares")
        spares.keep({here})
        assert spares.num_ready == 1
        wait_for(lambda: len(pids("spare-")) == 1, 20, f"the end of a spare: {pids('spare-')}")
        assert spares.num_lost == 0
        actor = spares.take(here, "train-9", "3")
        address = ray.get(actor.address.remote())
        end_processes([actor])
        assert (address.node, address.devices) == (here, "3"), "it sees the GPUs of the process that it replaces"
        assert spares.take(here, "train-8", None) is None
    finally:
        spares.close()
    wait_for(lambda: not pids("spare-"), 20, "the end of the spares")


def test_a_group_of_which_nothing_is_lost_ends_without_a_trace(raylets, run):
    time.sleep(0.1)
    run.stop()
    wait_for(lambda: not pids("train-") and not pids("spare-"), 20, "the end of the group and its spares")
