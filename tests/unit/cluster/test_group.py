"""The driver polls rank 0 often and the others rarely, spread over time; a silent rank is found all the same."""

from collections import Counter
from concurrent.futures import Future

import pytest

from isthmus.cluster.supervision import group as module
from isthmus.cluster.supervision.group import POLL_SECONDS, WorkerGroup
from isthmus.cluster.supervision.processes import Member
from isthmus.cluster.workers.actor import Progress, WorkerAddress
from isthmus.trainer.context import Rank
from tests.unit.cluster.configs import job_config

pytestmark = pytest.mark.unit
WORKERS = 200
UPDATE_SECONDS = 0.5


class Clock:
    """Stands in for the module `time`."""

    now = 100.0

    def monotonic(self):
        return self.now


class Reference:
    """What a call of an actor's method returns; never done where `future` is none."""

    def __init__(self, value=None, *, done=True):
        self._future = Future()
        if done:
            self._future.set_result(value)

    def future(self):
        return self._future


class Actor:
    """Responds to polls until it is silenced; its stage never ends."""

    def __init__(self, polls, rank):
        self.polls, self.number, self.silent, self.assignments = polls, rank, False, []
        self.poll, self.run = self, Run(self)

    def remote(self):
        self.polls[self.number] += 1
        return Reference(Progress("training", 7), done=not self.silent)


class Run:
    """The method `run` of an actor."""

    def __init__(self, actor):
        self.actor = actor

    def options(self, *, name):
        assert name == f"train-{self.actor.number}.run"
        return self

    def remote(self, assignment, *_):
        self.actor.assignments.append(assignment)
        return Reference(done=False)


@pytest.fixture
def launched(monkeypatch):
    clock, polls, put = Clock(), Counter(), []
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module.ray, "put", lambda value: put.append(value) or value)
    members = [
        Member(f"train-{rank}", Actor(polls, rank), WorkerAddress("n", "h", rank), Rank(rank, WORKERS), None)
        for rank in range(WORKERS)
    ]
    group = WorkerGroup([], members, ("h", 1))
    group.launch(job_config(), "stage1", 1, "entry")

    def pass_time(seconds):
        in_each = []
        for _ in range(int(seconds / UPDATE_SECONDS)):
            before = sum(polls.values())
            clock.now += UPDATE_SECONDS
            group.update(0.0)
            in_each.append(sum(polls.values()) - before)
        return in_each

    return group, pass_time, polls, put


def test_rank_0_is_polled_at_each_update_and_the_others_every_few_seconds(launched):
    group, pass_time, polls, _ = launched
    in_each = pass_time(50.0)
    assert polls[0] == 50 // UPDATE_SECONDS
    assert {polls[rank] for rank in range(1, WORKERS)} <= {9, 10, 11}
    share = WORKERS * UPDATE_SECONDS / POLL_SECONDS
    assert max(in_each) <= 1.5 * share, "the polls come all at once"
    assert group.step == 7


def test_a_rank_that_is_silent_is_unresponsive_and_no_other(launched):
    group, pass_time, _, _ = launched
    pass_time(10.0)
    group.members[150].actor.silent = True
    pass_time(55.0)
    assert group.unresponsive(60.0) is None
    pass_time(15.0)
    assert group.unresponsive(60.0) is group.members[150]


def test_the_configuration_is_sent_once_for_all_workers(launched):
    group, _, _, put = launched
    assert len(put) == 1
    assert all(member.actor.assignments == put for member in group.members)
