"""Infrastructure is retried while the run makes progress; what another attempt cannot help stops it."""

import pytest

from isthmus.cluster.config import ClusterConfig, RestartConfig
from isthmus.cluster.failures import Failure, FailureKind
from isthmus.cluster.supervision import restart_policy
from isthmus.cluster.supervision.restart_policy import RestartPolicy

pytestmark = pytest.mark.unit
HOUR = 3600.0
LOST = Failure(FailureKind.LOST, "train-1 died", rank=1, node="n1")
PREEMPTED = Failure(FailureKind.PREEMPTION, "node went away", rank=0, node="n2")
STORAGE = Failure(FailureKind.STORAGE, "s3://b: no response", rank=0)
DENIED = Failure(FailureKind.ACCESS, "s3://b: access denied", rank=0)
DEFECT = Failure(FailureKind.DEFECT, "TypeError: x", rank=5)


class Clock:
    """Stands in for the module `time`."""

    def __init__(self):
        self.now = 1e6

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(restart_policy, "time", clock)
    return clock


def policy(*, wait_seconds=HOUR, committed=None, trained=True, **restart):
    config = ClusterConfig(restart=RestartConfig(**restart), wait_seconds=wait_seconds)
    return RestartPolicy(config, committed, trained)


def on_rank(rank):
    return Failure(FailureKind.LOST, f"train-{rank} died", rank=rank)


@pytest.mark.parametrize("kind", [FailureKind.USER, FailureKind.DATA])
def test_what_another_attempt_cannot_help_stops_at_once(kind):
    assert policy().decide(Failure(kind, "bad key"), "stage1", 3).stop == f"{kind}: bad key"


def test_a_run_of_weeks_survives_any_number_of_losses_while_it_commits(clock):
    """128 spot nodes lose some 16 a day without notice: a budget for the whole run ended it within a day."""
    weeks = policy()
    for loss in range(1000):
        clock.now += 90 * 60
        weeks.commit("stage1", 100 * loss)
        decision = weeks.decide(on_rank(loss % 128), "stage1", 100 * loss + 7)
        assert decision.stop is None
        assert decision.pause_seconds == 0.0


def test_preemptions_never_use_up_a_run_that_commits(clock):
    weeks = policy(max_preemptions=2)
    for step in range(1, 2000):
        weeks.commit("stage1", step)
        assert weeks.decide(PREEMPTED, "stage1", step).stop is None


def test_a_storm_without_a_commit_stops_the_run(clock):
    storm = policy(max_failures=8)
    for failure in range(8):
        clock.now += 60
        assert storm.decide(on_rank(failure), "stage1", 7).stop is None
    stop = storm.decide(on_rank(8), "stage1", 7).stop
    assert stop is not None
    assert "9 times within 21600 s and no checkpoint committed in between" in stop
    assert "cluster.restart.max_failures = 8" in stop


def test_failures_longer_ago_than_the_window_do_not_count(clock):
    slow = policy(max_failures=2, window_seconds=HOUR)
    for rank in range(20):
        clock.now += 0.6 * HOUR
        assert slow.decide(on_rank(rank), "stage1", 7).stop is None


def test_preemptions_without_a_commit_have_a_budget_of_their_own(clock):
    preempted = policy(max_failures=0, max_preemptions=2)
    stops = [preempted.decide(PREEMPTED, "stage1", 5).stop for _ in range(3)]
    assert [stop is None for stop in stops] == [True, True, False]
    assert "cluster.restart.max_preemptions = 2" in stops[2]


def test_the_first_failure_after_a_commit_restarts_at_once_and_further_ones_wait_longer(clock):
    paused = policy(max_failures_at_same_step=10, max_failures=20)
    assert [paused.decide(LOST, "stage1", 7).pause_seconds for _ in range(8)] == [0, 2, 4, 8, 16, 32, 60, 60]
    paused.commit("stage1", 8)
    assert paused.decide(LOST, "stage1", 9).pause_seconds == 0


def test_an_outage_of_the_object_store_is_waited_for_and_counts_nothing(clock):
    outage = policy(max_failures=0, max_failures_at_same_step=1)
    for _ in range(30):
        clock.now += 60
        decision = outage.decide(STORAGE, "stage1", 7)
        assert decision.stop is None
        assert decision.await_store
    clock.now += HOUR
    stop = outage.decide(STORAGE, "stage1", 7).stop
    assert stop is not None
    assert "cluster.wait_seconds" in stop


def test_a_commit_ends_an_outage(clock):
    outage = policy()
    for step in range(10):
        clock.now += 0.9 * HOUR
        outage.commit("stage1", step)
        assert outage.decide(STORAGE, "stage1", step).stop is None


def test_access_denied_is_a_user_error_before_the_first_step_and_an_outage_later(clock):
    assert policy(trained=False).decide(DENIED, "stage1", 0).stop == "access denied on rank 0: s3://b: access denied"
    later = policy(trained=True).decide(DENIED, "stage1", 7)
    assert later.stop is None
    assert later.await_store


def test_missing_readers_are_charged_to_nothing(clock):
    readers = policy(max_failures=0, max_preemptions=0, max_failures_at_same_step=1)
    gone = Failure(FailureKind.READERS, "no reader", rank=0)
    assert all(readers.decide(gone, "stage1", 7).stop is None for _ in range(20))


def test_the_same_rank_at_the_same_step_stops_the_run(clock):
    same = policy(max_failures_at_same_step=3)
    assert same.decide(LOST, "stage1", 7).stop is None
    assert same.decide(LOST, "stage1", 7).stop is None
    decision = same.decide(LOST, "stage1", 7)
    assert decision.stop is not None
    assert "3 failures of the same rank at step 7 of stage1" in decision.stop
    assert decision.repeated


def test_other_ranks_at_the_same_step_are_a_coincidence(clock):
    same = policy(max_failures_at_same_step=2)
    assert all(same.decide(on_rank(rank), "stage1", 7).stop is None for rank in range(5))
    assert same.decide(on_rank(0), "stage1", 8).stop is None
    assert same.decide(on_rank(0), "stage2", 7).stop is None


def test_a_commit_behind_the_step_that_fails_does_not_hide_that_it_fails(clock):
    same = policy(max_failures_at_same_step=2)
    assert same.decide(LOST, "stage1", 7).stop is None
    same.commit("stage1", 6)
    assert same.decide(LOST, "stage1", 7).stop is not None


@pytest.mark.parametrize("kind", [FailureKind.DEFECT, FailureKind.MEMORY])
def test_a_defect_and_lack_of_memory_stop_the_run_where_they_repeat(clock, kind):
    failure = Failure(kind, "x", rank=0)
    repeated = policy()
    assert repeated.decide(failure, "stage1", 7).stop is None
    assert repeated.decide(failure, "stage1", 7).stop is not None
    once = policy()
    assert once.decide(failure, "stage1", 7).stop is None
    once.commit("stage1", 90)
    assert once.decide(failure, "stage1", 99).stop is None


def test_a_defect_beside_other_failures_is_no_repetition(clock):
    mixed = policy()
    for step, failure in enumerate((DEFECT, LOST, DEFECT, PREEMPTED, DEFECT)):
        assert mixed.decide(failure, "stage1", step).stop is None


def test_what_an_earlier_driver_committed_is_no_progress(clock):
    resumed = policy(committed=("stage1", 40), max_failures_at_same_step=9, max_failures=1)
    assert resumed.decide(LOST, "stage1", 41).stop is None
    resumed.commit("stage1", 40)
    assert resumed.decide(LOST, "stage1", 41).stop is not None


def test_nodes_that_fail_repeatedly_are_excluded_for_a_while(clock):
    nodes = policy(max_failures_at_same_step=9)
    nodes.decide(LOST, "stage1", 1)
    assert nodes.excluded_nodes == frozenset()
    nodes.decide(LOST, "stage1", 2)
    assert nodes.excluded_nodes == {"n1"}
    clock.now += 7 * HOUR
    assert nodes.excluded_nodes == frozenset()


def test_nothing_grows_with_the_length_of_a_run(clock):
    long = policy()
    for loss in range(5000):
        clock.now += 60
        long.commit("stage1", loss)
        assert long.decide(Failure(FailureKind.LOST, "x", rank=loss, node=f"n{loss}"), "stage1", loss).stop is None
        assert long.excluded_nodes == frozenset()
    assert len(long._failures) + len(long._same_step) <= 4
    assert len(long._node_failures) <= 6 * 60 + 1
