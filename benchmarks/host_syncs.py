"""Operations of a training step whose result the host has to wait for: on a GPU each one drains the queue of kernels.

Counted as PyTorch dispatches them, on the CPU: reading a value (`item`, `tolist`, `cpu`), and shapes that depend on
data (`nonzero`, boolean indices, `unique`). Packing of texts is not in the step: it works on the host's own tensors.

Usage: python -m benchmarks.host_syncs [--json]
"""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from isthmus.model.config import QFormerConfig, Stage1LossConfig
from isthmus.model.objectives.communicator import make_communicator
from isthmus.model.objectives.stage1 import Stage1Model
from isthmus.model.objectives.stage1_batch import Stage1Inputs
from isthmus.model.objectives.step import StepContext
from isthmus.model.qformer.qformer import QFormer
from tests.ranks import run_ranks
from tests.stage2_parts import stage2_parts

WAITING = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim",
    "unique_consecutive", "bincount",
}  # fmt: skip
READING = {Tensor.tolist: "tolist", Tensor.cpu: "cpu"}
QFORMER = QFormerConfig(
    hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, num_queries=4, vocab_size=60, max_positions=20,
    projection_size=8,
)  # fmt: skip
ROWS, PATCHES, IMAGE_WIDTH, LENGTH = 4, 6, 12, 9


class WaitCounter(TorchDispatchMode):
    """Counts operations by name; `with WaitCounter() as counter`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self._functions = _FunctionCounter(self.found)

    def __enter__(self) -> "WaitCounter":
        self._functions.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._functions.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.rpartition("::")[2]
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        if name in WAITING:
            self.found[name] += 1
        if any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices):
            self.found["boolean index"] += 1
        return func(*args, **(kwargs or {}))


class _FunctionCounter(TorchFunctionMode):
    """Counts what reaches no dispatcher where tensors are on the CPU anyway."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READING:
            self._found[READING[func]] += 1
        return func(*args, **(kwargs or {}))


def stage1_step(micro_batch_size: int, itm_rows: int | None = None) -> Callable[[], object]:
    """Return a step of stage 1 with dropout, a hole and texts of several lengths, on inputs packed by the host."""
    torch.manual_seed(0)
    model = Stage1Model(None, QFormer(QFORMER, IMAGE_WIDTH), Stage1LossConfig(itm_rows=itm_rows)).train()
    communicator = make_communicator(_world_size())
    real_BT = torch.arange(LENGTH) < torch.tensor([[9], [3], [5], [4]])
    inputs = Stage1Inputs(
        input_ids_BT=torch.randint(5, 50, (ROWS, LENGTH)) * real_BT,
        attention_mask_BT=real_BT.long(),
        valid_B=torch.tensor([True, True, False, True]),
        rows_B=torch.arange(ROWS) + ROWS * communicator.rank,
        image_BPD=torch.randn(ROWS, PATCHES, IMAGE_WIDTH),
    ).packed(micro_batch_size)
    return lambda: model.loss_and_backward(
        inputs, StepContext(communicator, micro_batch_size, backward=torch.Tensor.backward)
    )


def stage2_step(micro_batch_size: int, folder: Path, kind: str) -> Callable[[], object]:
    """Return a step of stage 2 with a language model of a kind (tests/stage2_parts.py), a hole among its rows."""
    parts = stage2_parts(folder, kind)
    parts.model.train()
    communicator = make_communicator(_world_size())
    inputs = parts.inputs(valid=[True, True, False, True])
    inputs = inputs.packed(micro_batch_size, is_encoder_decoder=parts.model.language.is_encoder_decoder)
    return lambda: parts.model.loss_and_backward(
        inputs, StepContext(communicator, micro_batch_size, backward=torch.Tensor.backward)
    )


def count(step: Callable[[], object]) -> dict[str, int]:
    """Return how often each waiting operation is run."""
    with WaitCounter() as counter:
        step()
    return dict(counter.found)


def count_on_rank(rank: int, world_size: int, folder: str) -> dict[str, dict[str, int]]:
    """Count both stages' steps of one and of two micro-batches on this rank."""
    del rank
    found = {}
    for micro_batches in (1, 2):
        size, place = ROWS // micro_batches, f"{world_size} ranks, {micro_batches} micro-batches"
        found[f"stage1, {place}"] = count(stage1_step(size))
        found[f"stage1 itm_rows, {place}"] = count(stage1_step(size, ROWS // 2))
        for kind in ("opt", "llama", "t5"):
            found[f"stage2 {kind}, {place}"] = count(stage2_step(size, Path(folder), kind))
    return found


def measure(world_size: int) -> dict[str, dict[str, int]]:
    """Return the counts of a step on so many ranks; those of the rank that waits most."""
    with tempfile.TemporaryDirectory() as folder:
        if world_size == 1:
            return count_on_rank(0, 1, folder)
        for kind in ("opt", "llama", "t5"):
            stage2_parts(Path(folder), kind)
        by_rank = run_ranks(count_on_rank, world_size, folder)
    return {case: max((found[case] for found in by_rank), key=lambda x: sum(x.values())) for case in by_rank[0]}


def _world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    found = measure(1) | measure(2)
    if parser.parse_args().json:
        print(json.dumps(found, indent=2))
        return
    for case, counts in found.items():
        print(f"{case}: {sum(counts.values())} {counts or ''}")


if __name__ == "__main__":
    main()
