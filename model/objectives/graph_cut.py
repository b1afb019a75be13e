"""Run one part of a step backward before the rest, so that its activations are freed before the gradients are there."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Cut:
    """Tensors cut from their graph: what reads them runs backward by itself and leaves their gradients here.

    `backward` may scale (by the world size, by a loss scale) and will scale the rest once more, so its factor is read
    from a probe whose gradient is otherwise 1, and taken out.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._whole = list(tensors)
        self.leaves = [x.detach().requires_grad_() for x in tensors]
        """What the early part reads in their place."""
        self._factor = tensors[0].new_ones(())

    def backward(self, loss: Tensor, backward: Callable[[Tensor], None]) -> None:
        """Run `loss`, which reads the leaves, backward."""
        probe = torch.zeros_like(loss, requires_grad=True)
        backward(loss + probe)
        assert probe.grad is not None
        self._factor = probe.grad

    def rest(self) -> Tensor:
        """Return a zero whose gradient is that of the losses with respect to what the tensors were computed from."""
        kept = [
            (whole, leaf.grad) for whole, leaf in zip(self._whole, self.leaves, strict=True) if leaf.grad is not None
        ]
        for leaf in self.leaves:
            leaf.grad = None
        rest: Tensor = _Carried.apply(self._factor, [grad for _, grad in kept], *(whole for whole, _ in kept))  # type: ignore[no-untyped-call]
        return rest


class _Carried(torch.autograd.Function):
    """A zero whose gradient with respect to some tensors is given, as that of a sum scaled by `factor`."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, grads: list[Tensor], *_: Tensor) -> Tensor:
        ctx.factor, ctx.grads = factor, grads
        return torch.zeros_like(factor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(x.mul_(grad / ctx.factor) for x in ctx.grads)
