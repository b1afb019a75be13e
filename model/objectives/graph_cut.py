"""Runs the backward pass of one part of a micro-batch before the rest, so that its activations are freed early."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Part = Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]]


def backward_first(
    tensors: Sequence[Tensor], part: Part, backward: Callable[[Tensor], None] | None
) -> tuple[Tensor, Tensor | float]:
    """Run a part of a computation forward and backward by itself, on detached copies of what it reads.

    `backward` may scale (by the world size, by a loss scale) and will scale the remainder once more, so its factor is
    read from a probe whose gradient is otherwise 1, and divided out.

    Args:
        tensors: what the part reads of the rest.
        part: returns its loss, and what it reports.
        backward: None: no gradient.

    Returns:
        The report, and a zero whose gradient is that of the loss with respect to what `tensors` were computed from.
    """
    if backward is None:
        return part(tensors)[1], 0.0
    leaves = [x.detach().requires_grad_() for x in tensors]
    loss, report = part(leaves)
    probe = torch.zeros_like(loss, requires_grad=True)
    backward(loss + probe)
    assert probe.grad is not None
    pairs = [(x, leaf.grad) for x, leaf in zip(tensors, leaves, strict=True) if leaf.grad is not None]
    zero: Tensor = _WithGradient.apply(probe.grad, [grad for _, grad in pairs], *(x for x, _ in pairs))  # type: ignore[no-untyped-call]
    return report, zero


class _WithGradient(torch.autograd.Function):
    """A zero whose gradient with respect to some tensors is given, as that of a loss scaled by `factor`."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, grads: list[Tensor], *_: Tensor) -> Tensor:
        ctx.factor, ctx.grads = factor, grads
        return torch.zeros_like(factor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(x.mul_(grad / ctx.factor) for x in ctx.grads)
