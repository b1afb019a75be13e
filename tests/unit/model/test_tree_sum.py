"""The tree of sums over virtual ranks is one and the same expression on any number of workers."""

import pytest
import torch

from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.order.virtual_ranks import virtual_ranks_of
from isthmus.model.objectives.tree_sum import TreeSum, tree_sum

pytestmark = pytest.mark.unit


class Term:
    """A number of which only is known what was added to what; addition is commutative and not associative."""

    def __init__(self, expression):
        self.expression = expression

    def add_(self, other):
        self.expression = frozenset([self.expression, other.expression])
        return self


def on_workers(world_size, virtual_ranks):
    """Add up inside each worker, then between workers in pairs; return the expressions that the workers end with."""
    sums = []
    for rank in range(world_size):
        total = TreeSum()
        for virtual in virtual_ranks_of(rank, world_size, virtual_ranks):
            total.add([Term(virtual)])
        sums.append(total.take()[0].expression)
    distance = 1
    while distance < world_size:
        sums = [frozenset([sums[rank], sums[rank ^ distance]]) for rank in range(world_size)]
        distance *= 2
    return sums


@pytest.mark.parametrize("virtual_ranks", [1, 2, 4, 8, 32])
def test_every_number_of_workers_computes_one_expression(virtual_ranks):
    sizes = [size for size in range(1, virtual_ranks + 1) if virtual_ranks % size == 0]
    found = {sum_ for size in sizes for sum_ in on_workers(size, virtual_ranks)}
    assert len(found) == 1


def test_workers_share_the_virtual_ranks():
    for size in (1, 2, 4, 8):
        shares = [virtual_ranks_of(rank, size, 8) for rank in range(size)]
        assert sorted(virtual for share in shares for virtual in share) == list(range(8))
    with pytest.raises(DataError, match="3 workers cannot share 8 virtual ranks equally; use 1, 2, 4, 8 workers"):
        virtual_ranks_of(0, 3, 8)


def test_few_terms_are_alive_at_a_time():
    total = TreeSum()
    for number in range(64):
        total.add([torch.tensor([float(number)])])
        assert sum(level is not None for level in total._levels) <= 6
    assert float(total.take()[0]) == sum(range(64))
    assert float(tree_sum([torch.tensor(1.0)] * 7)) == 7.0
