"""Two days of the month on spot nodes: the real driver under a simulated clock survives every kind of accident."""

import pytest

from benchmarks.scale.month import LOG, MAX_LOG_BYTES, WEATHER, simulate, steps_for
from benchmarks.scale.spot import curve, young_daly
from isthmus.cluster.status import RESTARTS_KEPT

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
DAYS = 2.0


def test_two_days_of_spot_nodes_outages_and_dead_drivers_end_finished_with_the_goodput_of_the_event_simulation(
    tmp_path,
):
    (expected,) = curve(WEATHER, [young_daly(WEATHER)], 20)
    found = simulate(tmp_path, DAYS, seed=3, steps=steps_for(DAYS, expected))
    assert found["outcome"] == "finished", found
    away = found["share of time store, credentials or readers were away"]
    assert found["goodput"] == pytest.approx(expected * (1 - away), abs=0.015), found
    assert found["restarts"] > 40
    kinds = found["listed restarts by kind"]
    assert {"lost process", "preemption", "object store", "access denied", "no readers"} <= set(kinds), kinds
    assert sum(kinds.values()) <= RESTARTS_KEPT
    assert found["driver processes"] == found["kills of the driver"] + 1 > 1
    assert found["files"] < 10
    largest = found["largest file, bytes"]
    assert largest.pop(LOG, 0) <= MAX_LOG_BYTES
    assert max(largest.values()) < 100_000
