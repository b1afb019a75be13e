"""Samples excluded from a data set: its chunks get smaller, and the rest is numbered without gaps."""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


class Exclusion:
    """The chunks of a data set without some of its samples.

    Args:
        chunk_samples: Samples of every chunk of the whole data set.
        excluded: Samples that are left out, counted over all chunks; any order, doubles are ignored.
    """

    def __init__(self, chunk_samples: NDArray[np.integer[Any]], excluded: IntArray) -> None:
        excluded = np.unique(np.asarray(excluded, dtype=np.int64))
        ends = np.cumsum(chunk_samples, dtype=np.int64)
        chunk_of = np.searchsorted(ends, excluded, side="right")
        self._excluded = excluded - (ends - chunk_samples)[chunk_of]  # by index in its chunk
        self._firsts = np.searchsorted(chunk_of, np.arange(len(chunk_samples) + 1))
        self.chunk_samples: NDArray[np.int32] = (chunk_samples - np.diff(self._firsts)).astype(np.int32)
        """Samples of every chunk that are left."""
        self.hash = hashlib.sha256(excluded.astype("<i8").tobytes()).hexdigest()
        """Identity of the set of excluded samples."""

    def sample(self, chunk: int, kept: int) -> int:
        """Return the index in its chunk of the chunk's sample number `kept` among those that are left."""
        excluded = self._of_chunk(chunk)
        return kept + int(np.searchsorted(excluded - np.arange(len(excluded)), kept, side="right"))

    def kept(self, chunk: int, sample: int) -> int | None:
        """Return the number of a sample among those of its chunk that are left; None if it is excluded."""
        excluded = self._of_chunk(chunk)
        before = int(np.searchsorted(excluded, sample))
        is_excluded = before < len(excluded) and excluded[before] == sample
        return None if is_excluded else sample - before

    def _of_chunk(self, chunk: int) -> IntArray:
        return self._excluded[self._firsts[chunk] : self._firsts[chunk + 1]]
