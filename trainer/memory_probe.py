"""A warm-up step that changes nothing: it finds shape and memory errors early and counts operations."""

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from isthmus.data_pipeline.reading.batch import Batch, TextEncoder
from isthmus.trainer.engine.engine import Engine
from isthmus.trainer.errors import TrainerError
from isthmus.trainer.task import Task

logger = logging.getLogger(__name__)
LONG_CAPTION = "a photo of " * 200


def probe_memory(task: Task, engine: Engine, batch: Batch, encoder: TextEncoder) -> float:
    """Run forward and backward with the longest possible texts, then with the batch's own; drop all gradients.

    Collective: every rank calls it with its part of the same step. Parameters, moments, step and loss scale stay.

    Returns:
        Floating-point operations per sample that a step on this batch executes, recomputed ones included.

    Raises:
        TrainerError: the device has too little memory; says which key to lower.
    """
    size = len(batch.captions)
    parameters = list(task.model.trainable_parameters().values())

    def drop(loss: Tensor) -> None:
        backward_beside(loss, parameters)

    try:
        longest = batch._replace(tokens=encoder([LONG_CAPTION] * size, list(range(size))))
        task.loss_and_backward(task.inputs(longest), batch.step, engine.precision, drop)
        with FlopCount() as counter:
            task.loss_and_backward(task.inputs(batch), batch.step, engine.precision, drop)
    except torch.OutOfMemoryError as error:
        raise TrainerError(
            f"{task.name}: a step does not fit into the device's memory; lower {task.name}.micro_batch_size "
            "or model.vision.micro_batch_size (neither changes the expected loss), or set activation_checkpointing "
            f"({error})"
        ) from error
    if engine.device.type == "cuda":
        torch.cuda.empty_cache()
    return float(counter.flops / size)


def backward_beside(loss: Tensor, parameters: Iterable[Tensor]) -> None:
    """Run backward and leave gradients at all leaves but `parameters`, so that an engine that has these never learns.

    Other leaves are a step's own: tensors at which it detached its graph and from which it continues later.
    """
    leaves = list(_leaves(loss))
    spared = set(map(id, parameters))
    for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves, allow_unused=True), strict=True):
        if id(leaf) not in spared and grad is not None:
            leaf.grad = grad if leaf.grad is None else leaf.grad + grad


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """Yield the tensors at which the graph of `loss` ends."""
    waiting = [loss.grad_fn]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting += [parent for parent, _ in node.next_functions]


class FlopCount(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's class is not annotated
    """Counts the floating-point operations of matrix products, convolutions and attention while it is active.

    PyTorch's own `FlopCounterMode` also tracks modules through gradient hooks, which forbid `autograd.grad`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and add its count, if it has one."""
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result
