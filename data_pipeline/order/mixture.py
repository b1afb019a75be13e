"""The source of each slot of a lane: proportional, evenly spread, and computed in closed form.

Slot i of lane l comes from the first source k whose count floor(i_k * w_k / r_k + phase_k,l) grows there, where i_k
counts the slots that earlier sources left over and r_k is the weight of the sources from k on: nested Beatty sequences.
Counts before any slot are therefore closed forms. The phases l / L make the lanes' roundings cancel (Hermite's
identity), so that the global batch is as even as one lane.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_WEIGHT_SCALE = 1 << 20  # weights as integers: slots * scale stays below 2**63 for 8e12 slots


class Mixture:
    """Deterministic interleaving of weighted sources over `lanes` streams."""

    def __init__(self, weights: Sequence[float], lanes: int) -> None:
        total = sum(weights)
        self.weights = tuple(max(1, round(weight / total * _WEIGHT_SCALE)) for weight in weights)
        self.lanes = lanes
        self._rest = [sum(self.weights[k:]) for k in range(len(weights))]
        # An odd stride per source keeps the phases of different sources from moving together.
        self._phases = [(np.arange(lanes, dtype=np.int64) * (2 * k + 1)) % lanes for k in range(len(weights))]

    def counts(self, slots: NDArray[np.int64] | int) -> NDArray[np.int64]:
        """Return how many of the first `slots` slots of every lane belong to each source, as [source, lane]."""
        left = np.broadcast_to(np.asarray(slots, dtype=np.int64), (self.lanes,))
        return self._split(left, np.arange(self.lanes))

    def lane_counts(self, first_slot: int, num_slots: int, lane: int) -> NDArray[np.int64]:
        """Return one lane's counts before each of the slots from `first_slot` and after the last: [source, slot]."""
        return self._split(np.arange(first_slot, first_slot + num_slots + 1, dtype=np.int64), np.asarray([lane]))

    def _split(self, left: NDArray[np.int64], lanes: NDArray[np.int64]) -> NDArray[np.int64]:
        counts = np.empty((len(self.weights), left.size), dtype=np.int64)
        for k, (weight, rest) in enumerate(zip(self.weights, self._rest, strict=True)):
            phase = self._phases[k][lanes]
            counts[k] = (left * (weight * self.lanes) + phase * rest) // (rest * self.lanes)
            left = left - counts[k]
        return counts
