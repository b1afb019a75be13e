"""The memory probe runs once under the same conditions, and again whenever one of them differs."""

import pytest
import torch

from isthmus.trainer.context import Rank
from isthmus.trainer.runs.probe_record import probed_work

pytestmark = pytest.mark.unit


class Run:
    """A run's record."""

    def __init__(self):
        self.token, self._facts = 3, {}

    def facts(self):
        return self._facts

    def record(self, **facts):
        self._facts |= facts


def test_a_probe_is_repeated_only_under_other_conditions():
    run, probes = Run(), []

    def probed(stage="stage1", world_size=2, device="cpu"):
        before = len(probes)

        def probe():
            probes.append(stage)
            return float(len(probes)), None

        work = probed_work(run, stage, Rank(0, world_size), torch.device(device), probe)
        return work, len(probes) > before

    assert probed() == ((1.0, None), True)
    assert probed() == ((1.0, None), False)
    assert probed(stage="stage2") == ((2.0, None), True)
    assert probed(stage="stage2", world_size=1) == ((3.0, None), True)
    assert probed(stage="stage2", world_size=1, device="meta") == ((4.0, None), True)
    run.token = 4  # another driver, perhaps with other code
    assert probed(stage="stage2", world_size=1, device="meta") == ((5.0, None), True)
    assert probed(stage="stage2", world_size=1, device="meta") == ((5.0, None), False)
