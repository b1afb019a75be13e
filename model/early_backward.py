"""Run one part of a step backward before the rest, so that its activations are freed before the gradients are there."""

from collections.abc import Callable

import torch
from torch import Tensor

from model.layers import ImageMemory, KeysValues


class CutMemory:
    """Image memory cut from its graph: what reads it runs backward by itself and leaves its gradient here.

    `backward` may scale (by the world size, by a loss scale) and will scale the rest once more, so its factor is read
    from a probe whose gradient is otherwise 1, and taken out.
    """

    def __init__(self, memory: ImageMemory) -> None:
        self._whole = [part for layer in memory.layers for part in layer]
        self._leaves = [part.detach().requires_grad_() for part in self._whole]
        pairs = zip(self._leaves[::2], self._leaves[1::2], strict=True)
        self.memory = memory._replace(layers=[KeysValues(*pair) for pair in pairs])
        self._factor = self._whole[0].new_ones(())

    def backward(self, loss: Tensor, backward: Callable[[Tensor], None]) -> None:
        """Run `loss`, which reads `memory`, backward."""
        probe = torch.zeros_like(loss, requires_grad=True)
        backward(loss + probe)
        assert probe.grad is not None
        self._factor = probe.grad

    def rest(self) -> Tensor:
        """Return a scalar whose gradient is that of the losses with respect to what the memory was computed from."""
        total = self._factor.new_zeros(())
        for whole, leaf in zip(self._whole, self._leaves, strict=True):
            if leaf.grad is not None:
                total = total + (whole * (leaf.grad / self._factor)).sum()
                leaf.grad = None
        return total
