"""The helper under most distributed tests: values, tracebacks, deaths and time limits of gloo ranks."""

import os
import time

import pytest
import torch

from tests.ranks import RanksFailed, run_ranks, run_ranks_unchecked

pytestmark = pytest.mark.integration


def _sum_of_ranks(rank: int, world_size: int, offset: int) -> int:
    value = torch.tensor(rank + offset)
    torch.distributed.all_reduce(value)
    return int(value)


def _misbehave(rank: int, world_size: int) -> str:
    if rank == 1:
        raise ValueError("rank one objects")
    if rank == 2:
        os._exit(7)
    if rank == 3:
        time.sleep(600)
    return "fine"


def test_every_rank_returns_its_value():
    assert run_ranks(_sum_of_ranks, 2, 10) == [21, 21]


def test_each_kind_of_failure_is_told_apart():
    results = run_ranks_unchecked(_misbehave, 4, timeout_seconds=30)
    assert results[0].value == "fine"
    assert "rank one objects" in (results[1].error or "")
    assert "exit code 7" in (results[2].error or "")
    assert "not done after" in (results[3].error or "")


def test_a_failing_rank_fails_the_caller():
    with pytest.raises(RanksFailed, match="rank one objects"):
        run_ranks(_misbehave, 2)
