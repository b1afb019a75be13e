"""Run one part of a micro-batch backward before the rest, so that its activations are freed early."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class GraphCut:
    """Detached copies of tensors: what reads them runs backward by itself and leaves their gradients here.

    `backward` may scale (by the world size, by a loss scale) and will scale the remainder once more, so its factor is
    read from a probe whose gradient is otherwise 1, and divided out.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self.leaves = [x.detach().requires_grad_() for x in tensors]
        """What the early part reads in place of the tensors."""
        self._factor = tensors[0].new_ones(())

    def backward(self, loss: Tensor, backward: Callable[[Tensor], None]) -> None:
        """Run `loss`, which reads the leaves, backward."""
        probe = torch.zeros_like(loss, requires_grad=True)
        backward(loss + probe)
        assert probe.grad is not None
        self._factor = probe.grad

    def remainder(self) -> Tensor:
        """Return a zero whose gradient is that of `loss` with respect to what the tensors were computed from."""
        pairs = [(x, leaf.grad) for x, leaf in zip(self._tensors, self.leaves, strict=True) if leaf.grad is not None]
        for leaf in self.leaves:
            leaf.grad = None
        zero: Tensor = _WithGradient.apply(self._factor, [grad for _, grad in pairs], *(x for x, _ in pairs))  # type: ignore[no-untyped-call]
        return zero


class _WithGradient(torch.autograd.Function):
    """A zero whose gradient with respect to some tensors is given, as that of a loss scaled by `factor`."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, grads: list[Tensor], *_: Tensor) -> Tensor:
        ctx.factor, ctx.grads = factor, grads
        return torch.zeros_like(factor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(x.mul_(grad / ctx.factor) for x in ctx.grads)
