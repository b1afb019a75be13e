"""Failures are put into classes, and each class has its own consequence."""

import pytest

from isthmus.cluster.config import RestartConfig
from isthmus.cluster.failures import Failure, FailureKind, classify, root_cause
from isthmus.cluster.supervision.restart_policy import RestartPolicy
from isthmus.data_pipeline.errors import AccessError, DataError, ReadersUnavailable, StalledError
from isthmus.data_pipeline.reading.backend import picklable_error
from isthmus.data_pipeline.reading.quarantine import BudgetExceeded
from isthmus.model.errors import ModelError
from isthmus.trainer.errors import CheckpointError, ConfigError, LeaseError, TrainerError

pytestmark = pytest.mark.unit
LOST = Failure(FailureKind.LOST, "train-1 died", rank=1, node="n1")
PREEMPTED = Failure(FailureKind.PREEMPTION, "node went away", rank=0, node="n2")


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConfigError("bad key"), FailureKind.USER),
        (TrainerError("other frozen weights"), FailureKind.USER),
        (CheckpointError("another model"), FailureKind.USER),
        (LeaseError("held"), FailureKind.USER),
        (ModelError("width"), FailureKind.USER),
        (DataError("no such manifest"), FailureKind.USER),
        (AccessError("s3://b/k: denied"), FailureKind.USER),
        (BudgetExceeded("a.tar: 3% bad samples"), FailureKind.DATA),
        (StalledError("s3://b/k: no byte for 20 s"), FailureKind.STORAGE),
        (picklable_error(StalledError("s3://b/k: no byte for 20 s")), FailureKind.STORAGE),
        (ReadersUnavailable("no reader for 3600 s"), FailureKind.LOST),
        (picklable_error(AccessError("s3://b/k: denied")), FailureKind.USER),
        (OutOfMemoryError("CUDA out of memory"), FailureKind.USER),
        (TypeError("a defect"), FailureKind.USER),
        (RuntimeError("Connection closed by peer"), FailureKind.ERROR),
        (OSError("socket"), FailureKind.ERROR),
    ],
)
def test_classes(error, kind):
    assert classify(error).kind is kind


def test_out_of_memory_names_the_remedy():
    assert "micro_batch_size" in classify(OutOfMemoryError("CUDA out of memory")).cause


def test_the_traceback_is_kept():
    try:
        raise ConfigError("bad key")
    except ConfigError as error:
        failure = classify(error)
    assert "test_failures.py" in failure.detail


def test_a_dead_rank_explains_the_broken_connections_of_its_peers():
    echo = Failure(FailureKind.ERROR, "Connection closed by peer", rank=0)
    assert root_cause([echo, LOST]) is LOST


def test_a_user_error_explains_a_dead_rank():
    user = Failure(FailureKind.USER, "no such file", rank=3)
    assert root_cause([LOST, user]) is user


def test_user_and_data_errors_stop_at_once():
    policy = RestartPolicy(RestartConfig())
    assert policy.decide(Failure(FailureKind.USER, "bad key"), "stage1", 3).stop
    assert policy.decide(Failure(FailureKind.DATA, "too many bad samples in a.tar"), "stage1", 3).stop


def test_the_first_failure_after_progress_restarts_at_once_and_further_ones_wait_longer():
    policy = RestartPolicy(RestartConfig(backoff_seconds=2, max_failures_at_same_step=10, max_failures=20))
    pauses = [policy.decide(LOST, "stage1", 7).pause_seconds for _ in range(8)]
    assert pauses == [0, 2, 4, 8, 16, 32, 60, 60]
    assert policy.decide(LOST, "stage1", 8).pause_seconds == 0


def test_failures_at_the_same_step_stop_the_run():
    policy = RestartPolicy(RestartConfig(max_failures_at_same_step=3))
    assert policy.decide(LOST, "stage1", 7).stop is None
    assert policy.decide(LOST, "stage1", 7).stop is None
    stop = policy.decide(LOST, "stage1", 7).stop
    assert stop is not None
    assert "3 failures in a row at step 7 of stage1" in stop


def test_progress_between_failures_is_no_repetition():
    policy = RestartPolicy(RestartConfig(max_failures_at_same_step=2))
    assert all(policy.decide(LOST, "stage1", step).stop is None for step in (7, 8, 9))
    assert policy.decide(LOST, "stage2", 0).stop is None


def test_failures_have_a_budget():
    policy = RestartPolicy(RestartConfig(max_failures=2))
    assert policy.decide(LOST, "stage1", 1).stop is None
    assert policy.decide(LOST, "stage1", 2).stop is None
    stop = policy.decide(LOST, "stage1", 3).stop
    assert stop is not None
    assert "max_failures = 2" in stop


def test_preemptions_have_a_budget_of_their_own_and_restart_at_once():
    policy = RestartPolicy(RestartConfig(max_failures=0, max_preemptions=2))
    decisions = [policy.decide(PREEMPTED, "stage1", 5) for _ in range(3)]
    assert [decision.stop is None for decision in decisions] == [True, True, False]
    assert decisions[0].pause_seconds == 0
    assert policy.num_failures == 0


def test_nodes_that_fail_again_are_bad():
    policy = RestartPolicy(RestartConfig())
    policy.decide(LOST, "stage1", 1)
    assert policy.excluded_nodes == frozenset()
    policy.decide(LOST, "stage1", 2)
    assert policy.excluded_nodes == {"n1"}
