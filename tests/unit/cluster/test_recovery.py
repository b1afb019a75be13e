"""Recovery time is attributed to phases that add up, and repeated steps are counted."""

import pytest

from isthmus.cluster.supervision.recovery import Recovery
from isthmus.cluster.workers.actor import Progress

pytestmark = pytest.mark.unit


def test_phases_add_up_and_lost_steps_are_those_done_twice():
    now = [100.0]
    recovery = Recovery(failed_step=17, failed_at=100.0, clock=lambda: now[0])
    for phase, seconds in (("clear", 1.0), ("pause", 2.0), ("place", 0.5)):
        now[0] += seconds
        recovery.mark(phase)
    now[0] += 4.0
    assert not recovery.reached(Progress("training", 15, start_seconds={"weights": 3.0}))
    now[0] += 1.0  # the first step was done 0.75 s before this answer
    start = {"weights": 3.0, "first step": 1.0}
    assert recovery.reached(Progress("training", 18, start_seconds=start, trained_seconds=0.75))
    assert recovery.lost_steps == 2
    assert recovery.phases == {"clear": 1.0, "pause": 2.0, "place": 0.5, "launch": 0.25} | start
    assert recovery.seconds == sum(recovery.phases.values()) == 7.75
