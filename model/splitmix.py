"""SplitMix64 on tensors: random bits as a pure function, the same on every device."""

from torch import Tensor

_GOLDEN = -7046029254386353131  # 2 ** 64 / golden ratio, as a signed number


def mix(states: Tensor) -> Tensor:
    """Return SplitMix64's output for every state, int64 of any shape.

    Source: Steele, Lea and Flood: Fast splittable pseudorandom number generators (OOPSLA 2014).
    """
    x = states + _GOLDEN
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right, filling with zeros as unsigned numbers do."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
