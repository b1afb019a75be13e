"""Randomness as a function: stable 64-bit hashes, hash streams and hash permutations.

The sample order is a contract between versions, so nothing here rests on a library's random generator: blake2b for
single values, SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014) for
permutations.
"""

import hashlib
import struct
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_BLOCK = 1 << 18


def stable_hash(*parts: int | str) -> int:
    """Return a 64-bit hash of the parts, the same on every machine and in every version."""
    return next(hash_stream(*parts))


def hash_stream(*parts: int | str) -> Iterator[int]:
    """Yield an endless sequence of 64-bit integers that is a function of the parts."""
    text = "\x1f".join(f"{type(part).__name__[0]}{part}" for part in parts)
    seed = text.encode(errors="surrogatepass")  # JSON may hold half of a surrogate pair
    block = 0
    while True:
        digest = hashlib.blake2b(seed, digest_size=64, salt=block.to_bytes(8, "little")).digest()
        yield from struct.unpack("<8Q", digest)
        block += 1


def uniform_stream(*parts: int | str) -> Iterator[float]:
    """Yield endless floats in [0, 1) that are a function of the parts."""
    for value in hash_stream(*parts):
        yield (value >> 11) * 2.0**-53


def permutation(size: int, *parts: int | str) -> NDArray[np.int32]:
    """Return a permutation of range(size) that is a function of the parts: the order of hashed counters.

    The counter sits in the low bits of its own hash, so that one in-place sort is all the work and all the memory.
    """
    index_mask = np.uint64((1 << max(size - 1, 1).bit_length()) - 1)
    offset = np.uint64(stable_hash(*parts))
    keys = np.arange(size, dtype=np.uint64)
    for block in np.split(keys, range(_BLOCK, size, _BLOCK)):  # views: temporaries stay small
        np.bitwise_or(block, _mixed(block, offset) & ~index_mask, out=block)
    keys.sort()
    keys &= index_mask
    return keys.astype(np.int32)


def _mixed(counters: NDArray[np.uint64], offset: np.uint64) -> NDArray[np.uint64]:
    """Return SplitMix64's output for a state that starts at `offset`."""
    with np.errstate(over="ignore"):
        hashes = (counters + np.uint64(1)) * _GOLDEN + offset
        for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
            hashes ^= hashes >> np.uint64(shift)
            hashes *= factor
        return hashes ^ (hashes >> np.uint64(31))
