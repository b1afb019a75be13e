"""The virtual ranks of a worker.

With L lanes and V virtual ranks, virtual rank v has the L / V lanes from v L / V on, and worker r of W computes the
V / W virtual ranks from r V / W on. Sums that add neighbours in pairs, then pairs of pairs and so on, thus have one
order whatever W is: V / W terms are added on one worker, then workers that are 1, 2, 4, ... apart.
"""

from isthmus.data_pipeline.errors import DataError


def virtual_ranks_of(rank: int, world_size: int, virtual_ranks: int) -> range:
    """Return the virtual ranks of a worker, in the order of its rows.

    Raises:
        DataError: the number of workers does not divide that of virtual ranks.
    """
    if virtual_ranks % world_size:
        allowed = [size for size in range(1, virtual_ranks + 1) if virtual_ranks % size == 0]
        raise DataError(
            f"{world_size} workers cannot share {virtual_ranks} virtual ranks equally; "
            f"use {', '.join(map(str, allowed))} workers (run.virtual_ranks is fixed for a run)"
        )
    share = virtual_ranks // world_size
    return range(rank * share, (rank + 1) * share)
