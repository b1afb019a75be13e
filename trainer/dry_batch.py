"""A first batch that changes nothing: shape and memory errors show before hours are spent, and the work is counted."""

import logging
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from isthmus.data_pipeline.reading.batch import Batch, TextEncoder
from isthmus.trainer.engine.engine import Engine
from isthmus.trainer.errors import TrainerError
from isthmus.trainer.task import Task

logger = logging.getLogger(__name__)
LONG_CAPTION = "a photo of " * 200


def rehearse(task: Task, engine: Engine, batch: Batch, encoder: TextEncoder) -> float:
    """Run forward and backward with the longest possible texts, then with the batch's own; drop all gradients.

    Collective: every rank calls it with its part of the same step. Parameters, moments, step and loss scale stay.

    Returns:
        Floating-point operations per sample of a step on this batch's real lengths.

    Raises:
        TrainerError: the device has too little memory; says which key to lower.
    """
    size = len(batch.captions)
    try:
        task.rehearse(batch._replace(tokens=encoder([LONG_CAPTION] * size, list(range(size)))), engine)
        with FlopCount() as counter:
            task.rehearse(batch, engine)
    except torch.OutOfMemoryError as error:
        raise TrainerError(
            f"{task.name}: the first batch does not fit into the device's memory; lower {task.name}.micro_batch_size "
            "or model.vision.micro_batch_size (neither changes the result), or set activation_checkpointing "
            f"({error})"
        ) from error
    if engine.device.type == "cuda":
        torch.cuda.empty_cache()
    return float(counter.flops / size)


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
