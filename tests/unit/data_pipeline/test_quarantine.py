"""The budget stops a run at the right sample and names the worst shard; records are one line of JSON each."""

import pytest

from isthmus.data_pipeline.config import BudgetConfig
from isthmus.data_pipeline.reading.quarantine import BadRecord, Budget, BudgetExceeded

pytestmark = pytest.mark.unit


def record(shard="s3://b/00001.tar", key="k", cause="undecodable_image", detail="cut short"):
    return BadRecord(0, 0, 0, 0, 0, shard, key, 512, cause, detail)


def test_a_rate_below_the_budget_is_tolerated_for_ever():
    budget = Budget(BudgetConfig(max_bad_fraction=0.1, window_samples=100, max_consecutive=5))
    for _ in range(200):
        budget.add([0] * 10, {3: record()})


def test_a_rate_above_the_budget_stops_and_names_the_worst_shard():
    budget = Budget(BudgetConfig(max_bad_fraction=0.1, window_samples=100, max_consecutive=50))
    budget.add([0] * 50, {i: record() for i in range(0, 18, 3)})
    budget.add([0] * 50, {i: record("s3://b/00009.tar") for i in (1, 10, 20, 30)})
    with pytest.raises(BudgetExceeded) as caught:
        budget.add([0] * 10, {0: record("s3://b/00001.tar", key="last")})
    for expected in ("11 of the last", "s3://b/00001.tar with 7", "'last'", "cut short", "isthmus data verify"):
        assert expected in str(caught.value)


def test_the_window_slides():
    budget = Budget(BudgetConfig(max_bad_fraction=0.1, window_samples=100, max_consecutive=50))
    for _ in range(20):
        budget.add([0] * 10, {i: record() for i in range(5)})
        for _ in range(9):
            budget.add([0] * 10, {})


def test_bad_samples_in_a_row_are_counted_per_source():
    budget = Budget(BudgetConfig(max_bad_fraction=1.0, window_samples=1000, max_consecutive=3))
    sources = [0, 1] * 3
    budget.add(sources, {0: record(), 2: record(), 4: record()})  # three in a row in source 0 beside good ones of 1
    with pytest.raises(BudgetExceeded, match="4 bad samples in a row in source 0"):
        budget.add(sources, {0: record()})


def test_a_good_sample_ends_the_row():
    budget = Budget(BudgetConfig(max_bad_fraction=1.0, window_samples=1000, max_consecutive=3))
    for _ in range(10):
        budget.add([0] * 4, {i: record() for i in range(3)})


def test_no_tolerance_stops_at_the_first():
    budget = Budget(BudgetConfig(max_bad_fraction=0.0))
    with pytest.raises(BudgetExceeded):
        budget.add([0], {0: record()})
