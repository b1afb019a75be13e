"""Failures are put into classes, and each class has its own consequence."""

import subprocess
import sys

import pytest
import torch

from isthmus.cluster.failures import Failure, FailureKind, classify, on_rank, root_cause
from isthmus.data_pipeline.errors import (
    AccessError,
    DataError,
    PoisonPartError,
    ReadersUnavailable,
    StalledError,
    UnavailableError,
)
from isthmus.data_pipeline.reading.backend import picklable_error
from isthmus.data_pipeline.reading.quarantine import BudgetExceeded
from isthmus.model.errors import ModelError
from isthmus.trainer.errors import (
    CheckpointError,
    ConfigError,
    LeaseError,
    MainRankError,
    SaveFailedError,
    TrainerError,
)

pytestmark = pytest.mark.unit
LOST = Failure(FailureKind.LOST, "train-1 died", rank=1, node="n1")
PREEMPTED = Failure(FailureKind.PREEMPTION, "node went away", rank=0, node="n2")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConfigError("bad key"), FailureKind.USER),
        (TrainerError("other frozen weights"), FailureKind.USER),
        (CheckpointError("another model"), FailureKind.USER),
        (LeaseError("held"), FailureKind.USER),
        (ModelError("width"), FailureKind.USER),
        (DataError("no such manifest"), FailureKind.USER),
        (AccessError("s3://b/k: denied"), FailureKind.ACCESS),
        (BudgetExceeded("a.tar: 3% bad samples"), FailureKind.DATA),
        (StalledError("s3://b/k: no byte for 20 s"), FailureKind.STORAGE),
        (picklable_error(StalledError("s3://b/k: no byte for 20 s")), FailureKind.STORAGE),
        (ReadersUnavailable("no reader for 3600 s"), FailureKind.READERS),
        (picklable_error(AccessError("s3://b/k: denied")), FailureKind.ACCESS),
        (PoisonPartError("step 7: a.tar ended three readers"), FailureKind.USER),
        (SaveFailedError("no save within 600 s"), FailureKind.STORAGE),
        (torch.OutOfMemoryError("CUDA out of memory"), FailureKind.MEMORY),
        (MemoryError(), FailureKind.MEMORY),
        (TypeError("a defect"), FailureKind.DEFECT),
        (ImportError("no module"), FailureKind.USER),
        (RuntimeError("Connection closed by peer"), FailureKind.ERROR),
        (OSError("socket"), FailureKind.ERROR),
    ],
)
def test_classes(error, kind):
    assert classify(error).kind is kind


def test_out_of_memory_names_the_remedy():
    assert "micro_batch_size" in classify(torch.OutOfMemoryError("CUDA out of memory")).cause


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


@pytest.mark.parametrize(
    "error",
    [UnavailableError("503"), AccessError("403"), ConfigError("wrong"), LeaseError("held"), OSError("broken pipe")],
)
def test_what_rank_0_could_not_decide_is_explained_by_rank_0(error):
    """An outage of the store at a restore ended the run: the other ranks' echo was taken for a user error."""
    own = on_rank(classify(error), 0, None)
    echo = on_rank(classify(MainRankError(f"rank 0: {error}")), 1, None)
    assert root_cause([echo, own]).kind is (own.kind if own.kind is not FailureKind.ERROR else FailureKind.STORAGE)


@pytest.mark.parametrize("kind", [FailureKind.LOST, FailureKind.PREEMPTION, FailureKind.STORAGE])
def test_a_type_error_beside_a_lost_process_is_an_echo(kind):
    echo = Failure(FailureKind.DEFECT, "TypeError: half torn down", rank=0)
    cause = Failure(kind, "train-3", rank=3)
    assert root_cause([echo, cause]) is cause


def test_the_class_of_an_error_is_found_by_its_bases_and_never_by_its_name():
    class StoreError(RuntimeError):
        """Not ours."""

    assert classify(StoreError("a stranger")).kind is FailureKind.ERROR


def test_the_driver_starts_and_classifies_without_loading_torch():
    classify = "from isthmus.cluster import driver, failures; failures.classify(TypeError('x'))"
    program = f"import sys; {classify}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"
