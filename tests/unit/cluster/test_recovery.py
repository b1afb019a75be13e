"""Recovery time is attributed to phases that add up, and repeated steps are counted."""

import pytest

from isthmus.cluster.supervision.recovery import Recovery

pytestmark = pytest.mark.unit


def test_phases_add_up_and_lost_steps_are_those_done_twice():
    now = [100.0]
    recovery = Recovery(failed_step=17, failed_at=100.0, clock=lambda: now[0])
    for phase, seconds in (("clear", 1.0), ("pause", 2.0), ("place", 0.5)):
        now[0] += seconds
        recovery.mark(phase)
    now[0] += 4.0
    assert not recovery.reached(15)
    now[0] += 0.25
    assert not recovery.reached(15)
    assert recovery.reached(16)
    assert recovery.lost_steps == 2
    assert recovery.phases == {"clear": 1.0, "pause": 2.0, "place": 0.5, "start": 4.0, "step": 0.25}
    assert recovery.seconds == sum(recovery.phases.values())
