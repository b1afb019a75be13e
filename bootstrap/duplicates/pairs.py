"""Pairs of equal or nearly equal 64-bit hashes, without comparing all pairs.

Hashes that differ in at most d bits agree in at least one of d + 1 bands of bits (Manku et al., Detecting
near-duplicates for web crawling, WWW 2007). So it suffices to compare those with an equal band, and the hashes can be
split by the value of a band into parts that fit into memory.
"""

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Hashes = NDArray[np.uint64]
BITS = 64


def band_values(hashes: Hashes, band: int, num_bands: int) -> Hashes:
    """Return the bits of each hash that lie in a band; the last band has what is left over."""
    width = BITS // num_bands
    bits = BITS - band * width if band == num_bands - 1 else width
    return (hashes >> np.uint64(band * width)) & np.uint64((1 << bits) - 1)


def identical_pairs(hashes: Hashes, ids: Ids) -> Ids:
    """Return pairs (first, other), shape (pairs, 2), for the ids of each hash that occurs more than once."""
    order = np.lexsort((ids, hashes))
    hashes, ids = hashes[order], ids[order]
    is_first = np.concatenate([[True], hashes[1:] != hashes[:-1]]) if len(hashes) else np.zeros(0, dtype=np.bool_)
    firsts = np.repeat(ids[is_first], np.diff(np.append(np.flatnonzero(is_first), len(ids))))
    return np.stack([firsts[~is_first], ids[~is_first]], axis=1)


def near_pairs(hashes: Hashes, ids: Ids, band: int, max_distance: int) -> Ids:
    """Return pairs of ids, shape (pairs, 2), whose hashes differ in 1 to `max_distance` bits and agree in a band.

    Of several ids with the same hash, the first represents all.
    """
    order = np.lexsort((ids, hashes))
    hashes, places = np.unique(hashes[order], return_index=True)
    ids = ids[order][places]
    values = band_values(hashes, band, max_distance + 1)
    order = np.argsort(values, kind="stable")
    hashes, ids, values = hashes[order], ids[order], values[order]
    ends = np.searchsorted(values, values, side="right")
    found, left, distance = [np.zeros((0, 2), dtype=np.int64)], np.arange(len(hashes)), 1
    while len(left := left[left + distance < ends[left]]):  # those with a neighbour so far on in the same bucket
        is_near = np.bitwise_count(hashes[left] ^ hashes[left + distance]) <= max_distance
        found.append(np.stack([ids[left[is_near]], ids[left[is_near] + distance]], axis=1))
        distance += 1
    return np.concatenate(found)
