"""Seeds are functions of the place in the run."""

import pytest

from isthmus.trainer.build import derive_seed, stage_seed

pytestmark = pytest.mark.unit


def test_every_part_of_the_place_counts():
    places = [
        (s, stage, step, rank)
        for s in (0, 1)
        for stage in ("stage1", "stage2")
        for step in (0, 1, 10)
        for rank in (0, 1)
    ]
    assert len({derive_seed("step", *place) for place in places}) == len(places)
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed("1") != derive_seed(1)
    assert stage_seed(0, "stage1") != stage_seed(0, "stage2")


def test_seeds_are_a_contract():
    assert derive_seed("step", 0, "stage1", 0, 0) == 6139728584863010370
