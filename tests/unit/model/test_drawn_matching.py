"""Matching on some rows: an unbiased estimate of the loss of all, and the same rows however the work is split."""

from collections import Counter
from itertools import combinations

import pytest
import torch

from isthmus.model.objectives import negatives
from isthmus.model.objectives.communicator import LocalCommunicator
from isthmus.model.objectives.negatives import draw_rows
from isthmus.model.objectives.stage1_batch import GlobalBatch
from isthmus.model.objectives.step import StepContext
from tests.fixtures_stage1 import losses_and_gradients
from tests.unit.model.test_stage1_reference import TOLERANCE, difference, reference

pytestmark = pytest.mark.unit
ROWS = 6


def batch_of(rows_N: list[int], holes: tuple[int, ...] = ()) -> GlobalBatch:
    """Return what a draw reads of a global batch."""
    rows, nothing = torch.tensor(rows_N), torch.empty(0)
    valid = torch.tensor([row not in holes for row in rows_N])
    return GlobalBatch(nothing, nothing, rows, valid, nothing, nothing, nothing, nothing, nothing)


def place(seed: int, step: int) -> StepContext:
    return StepContext(LocalCommunicator(), ROWS, seed=seed, step=step)


@pytest.mark.parametrize("holes", [(), (1, 4)])
@pytest.mark.parametrize("size", [ROWS, 2])
def test_the_mean_over_all_draws_is_the_loss_and_gradient_of_all_rows(monkeypatch, holes, size):
    inputs = reference.rows()
    inputs.valid_B[list(holes)] = False
    expected = losses_and_gradients(reference.model(), inputs, size)
    draws = list(combinations([row for row in range(ROWS) if row not in holes], 2))
    found = []
    for drawn in draws:
        monkeypatch.setattr(negatives, "draw_rows", lambda *_, drawn=drawn, **__: torch.tensor(drawn))
        found.append(losses_and_gradients(reference.model(itm_rows=2), inputs, size))
    losses = {name: sum(x[0][name] for x in found) / len(draws) for name in expected[0]}
    gradients = {name: sum(x[1][name] for x in found) / len(draws) for name in expected[1]}
    assert max(difference((losses, gradients), expected)) < TOLERANCE
    assert len({x[0]["loss_itm"] for x in found}) == len(draws), "each draw has a loss of its own"


@pytest.mark.parametrize("size", [ROWS, 2])
def test_drawing_all_rows_is_no_draw(size):
    expected = losses_and_gradients(reference.model(), reference.rows(), size)
    found = losses_and_gradients(reference.model(itm_rows=ROWS), reference.rows(), size)
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], x) for name, x in expected[1].items())


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("num_rows", [1, 4, 5])
def test_micro_batches_change_nothing(num_rows, size):
    expected = losses_and_gradients(reference.model(itm_rows=num_rows), reference.rows(), ROWS)
    found = losses_and_gradients(reference.model(itm_rows=num_rows), reference.rows(), size)
    assert max(difference(found, expected)) < TOLERANCE


def test_only_the_drawn_rows_are_matched():
    matched = []
    for num_rows in (None, 2):
        model = reference.model(itm_rows=num_rows)
        match = model.match
        model.match = lambda text, *rest, match=match: matched.append(text.batch) or match(text, *rest)
        losses_and_gradients(model, reference.rows(), ROWS)
    assert matched == [3 * ROWS, 3 * 2]


def test_every_row_is_drawn_as_often_as_any_other_and_holes_last():
    steps = 2000
    drawn = [draw_rows(batch_of(list(range(16)), holes=(3, 7)), 4, place(5, step)).tolist() for step in range(steps)]
    assert all(len(set(rows)) == 4 for rows in drawn)
    counts = Counter(row for rows in drawn for row in rows)
    expected, deviation = steps * 4 / 14, (steps * 4 / 14 * 10 / 14) ** 0.5
    assert set(counts) == set(range(16)) - {3, 7}
    assert all(abs(count - expected) < 5 * deviation for count in counts.values())
    together = Counter(pair for rows in drawn for pair in combinations(sorted(rows), 2))
    assert len(together) == 14 * 13 // 2, "any two rows can be drawn together"
    assert {3, 7} == set(draw_rows(batch_of(list(range(16)), holes=(3, 7)), 16, place(5, 0))[14:].tolist())


def test_the_draw_is_a_function_of_seed_step_and_global_row():
    rows = list(range(0, 64, 2)) + list(range(1, 64, 2))

    def drawn(order: list[int], seed: int, step: int) -> set[int]:
        return {order[column] for column in draw_rows(batch_of(order), 8, place(seed, step)).tolist()}

    first = drawn(sorted(rows), 1, 2)
    assert first == drawn(rows, 1, 2)
    assert len({frozenset(first), frozenset(drawn(rows, 1, 3)), frozenset(drawn(rows, 2, 2))}) == 3
