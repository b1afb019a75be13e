"""The lanes and the virtual ranks of a worker.

With L lanes and V virtual ranks, virtual rank v has the L / V lanes from v L / V on, and worker r of W computes the
V / W virtual ranks from r V / W on. Sums that add neighbours in pairs, then pairs of pairs and so on, thus have one
order whatever W is: V / W terms are added on one worker, then workers that are 1, 2, 4, ... apart.
"""

from dataclasses import dataclass

from isthmus.data_pipeline.errors import DataError


@dataclass(frozen=True)
class LaneShare:
    """Which lanes one rank has."""

    rank: int = 0
    world_size: int = 1
    virtual_ranks: int | None = None
    """The rank has the lanes of its virtual ranks (`virtual_ranks_of`); None means every `world_size`-th lane."""

    def lanes(self, num_lanes: int) -> list[int]:
        """Return the lanes of this rank, in the order of its rows.

        Raises:
            DataError: the number of ranks does not divide that of lanes or of virtual ranks.
        """
        if num_lanes % self.world_size:
            raise DataError(
                f"{self.world_size} ranks do not divide data.lanes = {num_lanes}; use a world size that divides "
                f"{num_lanes} (lanes are fixed for a run)"
            )
        if self.virtual_ranks is None:
            return list(range(self.rank, num_lanes, self.world_size))
        width = num_lanes // self.virtual_ranks
        own = virtual_ranks_of(self.rank, self.world_size, self.virtual_ranks)
        return list(range(own.start * width, own.stop * width))


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
