"""From the gradients of a step's micro-batches to new weights: summed by DeepSpeed, or in a tree of fixed order."""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from isthmus.model.objectives.tree_sum import TreeSum, tree_reduce_scatter
from isthmus.trainer.engine.deepspeed_workarounds import drop_accumulation
from isthmus.trainer.engine.optimizer import ClippedAdamW
from isthmus.trainer.engine.state_shards import flat_tensors, refresh_working_copies

SEGMENT_ALIGNMENT = 64
"""Elements: every segment begins at a cache line and ends with a whole vector register."""


class DeepSpeedUpdate:
    """DeepSpeed reduces, in parameter order, once per step: fast, with sums whose order depends on the world size."""

    def __init__(self, wrapped: Any, parameters: Mapping[str, nn.Parameter], world_size: int) -> None:
        self._wrapped, self._parameters, self._world_size = wrapped, parameters, world_size
        self._accumulation: ExitStack | None = None

    @property
    def norm(self) -> Any:
        """Global norm of the gradient as it was reduced; known from within `step` on."""
        return self._wrapped.optimizer._global_grad_norm

    def backward(self, loss: Tensor) -> None:
        """Add a gradient."""
        if self._accumulation is None:
            self._accumulation = ExitStack()
            self._accumulation.enter_context(self._wrapped.coalesce_grad_reduction())
        self._wrapped.optimizer.clear_backward_seen_flag()
        self._wrapped.backward(loss * self._world_size)  # by which DeepSpeed divides

    def end_micro_batch(self) -> None:
        """Nothing to do: gradients of micro-batches add up where they are."""

    def step(self) -> bool:
        """Reduce and update; False: the gradient was not finite on some rank, nothing is updated. Collective."""
        assert self._accumulation is not None
        self._add_missing_gradients()
        self._accumulation.close()
        self._accumulation = None
        self._wrapped.step()
        return bool(self._wrapped.was_step_applied())

    def close(self) -> None:
        """Drop a step under way without a collective."""
        if self._accumulation is not None:
            drop_accumulation(self._wrapped, self._accumulation)
            self._accumulation = None

    def _add_missing_gradients(self) -> None:
        """Give parameters that no loss of this rank reached a zero gradient, so that all ranks reduce the same ones."""
        for parameter in self._parameters.values():
            if parameter.grad is None and not hasattr(parameter, "ds_id"):
                parameter.grad = torch.zeros_like(parameter)


class TreeUpdate:
    """The gradients of virtual ranks are added in one fixed tree: the same bits on any number of ranks.

    Each of V virtual ranks is a micro-batch. DeepSpeed keeps the layout (ZeRO-1 and 2): a rank updates its contiguous
    part of each flat group and gathers the others'. Groups are padded (`pad_groups`) so that a rank's part is V / W
    whole segments: optimizer and norm run on segments, whose shapes do not depend on the number of ranks either.
    """

    def __init__(self, zero: Any, optimizer: ClippedAdamW, virtual_ranks: int) -> None:
        self._zero, self._optimizer = zero, optimizer
        self._num_segments = virtual_ranks // dist.get_world_size()
        self._sum = TreeSum()
        self.norm: Tensor = torch.zeros(())
        for hook in zero._grad_acc_hooks:  # DeepSpeed would reduce at the end of each backward
            hook.remove()
        self._groups = [self._split(*pair) for pair in zip(optimizer.param_groups, flat_tensors(zero), strict=True)]

    def backward(self, loss: Tensor) -> None:
        """Add a gradient to those of the present micro-batch."""
        loss.backward()  # type: ignore[no-untyped-call]

    def end_micro_batch(self) -> None:
        """Take the gradients of the micro-batch as the next term of the sum."""
        parameters = [parameter for group in self._zero.round_robin_bit16_groups for parameter in group]
        self._sum.add([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
        for parameter in parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> bool:
        """Reduce and update; False: the gradient was not finite on some rank, nothing is updated. Collective."""
        for segments, grad in zip(self._groups, self._reduced(), strict=True):
            for segment, part in zip(segments, grad.chunk(self._num_segments), strict=True):
                segment.grad = part.to(segment.device)
        self.norm = self._global_norm()
        applied = math.isfinite(self.norm)
        if applied:
            self._optimizer.step()
            refresh_working_copies(self._zero)
        for segment in chain.from_iterable(self._groups):
            segment.grad = None
        return applied

    def close(self) -> None:
        """Nothing to do: gradients of a step under way go with the parameters."""

    def _split(self, group: dict[str, Any], flat: nn.Parameter) -> list[Tensor]:
        """Let the optimizer update the segments of this rank's part of a group, as views of it and of its moments."""
        state = self._optimizer.state[flat]
        pieces = [x.detach().chunk(self._num_segments) for x in (flat, state["exp_avg"], state["exp_avg_sq"])]
        for segment, exp_avg, exp_avg_sq in zip(*pieces, strict=True):
            self._optimizer.state[segment] = {
                "step": state["step"].clone(), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq,
            }  # fmt: skip
        group["params"] = list(pieces[0])
        return list(pieces[0])

    def _reduced(self) -> list[Tensor]:
        """Return this rank's part of each group's summed gradient."""
        terms = iter(self._sum.take())
        reduced = []
        groups = zip(self._zero.round_robin_bit16_groups, self._zero.round_robin_bit16_offsets, strict=True)
        for (parameters, offsets), flat in zip(groups, self._zero.bit16_groups_flat, strict=True):
            grad = torch.zeros_like(flat)
            for parameter, offset in zip(parameters, offsets, strict=True):
                grad[offset : offset + parameter.numel()] = next(terms).flatten()
            reduced.append(tree_reduce_scatter(grad))
        return reduced

    def _global_norm(self) -> Tensor:
        """Return the norm over all ranks: squares are added within a segment, then over groups, then over segments."""
        norms = [
            torch.stack([torch.linalg.vector_norm(x.grad, dtype=torch.float64) for x in segments])
            for segments in self._groups
        ]
        own = torch.stack(norms).square().sum(dim=0)
        everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, own)
        return torch.cat(everyone).sum().sqrt().float()


def pad_groups(groups: list[dict[str, Any]], virtual_ranks: int) -> list[nn.Parameter]:
    """Append a parameter of zeros to each group of a model where its length needs it; return those parameters."""
    added = []
    for group in groups:
        length = -sum(parameter.numel() for parameter in group["params"]) % (SEGMENT_ALIGNMENT * virtual_ranks)
        if length:
            group["params"].append(nn.Parameter(group["params"][0].new_zeros(length)))
            added.append(group["params"][-1])
    return added
