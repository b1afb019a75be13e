"""What the same bits on any number of workers cost: stage-1 steps of recipes/tiny.yaml and demo.yaml on gloo ranks.

Random image features in the shape of the recipe's encoder, whose own time would make every share smaller. Ways, one
after the other in the same processes, in both directions so that what else the machine does falls on all:
ordinary   each rank has its own rows in micro-batches of the recipe's size, DeepSpeed reduces
cut        the same rows as virtual ranks, DeepSpeed reduces
tree       the same, summed in the fixed tree
Per rank and step, rank 0: CPU seconds (the median) of all of it and of `Engine.step` alone, which reduces and updates;
megabytes in its collectives, by kind; growth of anonymous memory over a step.
Run: OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.virtual_ranks [--recipe tiny] [--steps 6]
"""

import argparse
import json
import statistics
import time
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.frozen_load import Watched
from isthmus.data_pipeline.order.virtual_ranks import virtual_ranks_of
from isthmus.model.config import QFormerConfig, Stage1LossConfig
from isthmus.model.objectives.communicator import make_communicator
from isthmus.model.objectives.stage1 import Stage1Model
from isthmus.model.objectives.stage1_batch import Stage1Inputs
from isthmus.model.objectives.step import StepContext
from isthmus.model.qformer.qformer import QFormer
from isthmus.trainer.config.schema import StageConfig
from isthmus.trainer.context import LocalContext
from isthmus.trainer.engine.deepspeed_workarounds import drain_gloo
from isthmus.trainer.engine.engine import Engine, build_engine
from tests.ranks import run_ranks

WAYS = ("ordinary", "cut", "tree")
LIMIT_SECONDS = 3000.0
RECIPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "qformer": {
            "hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 128, "num_queries": 8,
            "vocab_size": 110, "max_positions": 32, "projection_size": 32,
        },
        "batch": 32, "micro": 16, "patches": 17, "width": 32, "tokens": 24,
    },
    "demo": {
        "qformer": {
            "hidden_size": 384, "num_layers": 6, "num_heads": 12, "intermediate_size": 1536, "num_queries": 8,
        },
        "batch": 64, "micro": 32, "patches": 16, "width": 1280, "tokens": 16,
    },
}  # fmt: skip


def inputs_of(recipe: dict[str, Any], rows: list[int]) -> Stage1Inputs:
    """Return some rows of the global batch; texts are half to wholly full."""
    generator = torch.Generator().manual_seed(0)
    batch, width = recipe["batch"], recipe["tokens"]
    vocabulary = QFormerConfig(**recipe["qformer"]).vocab_size
    lengths = torch.randint(width // 2, width + 1, (batch,), generator=generator)
    whole = Stage1Inputs(
        input_ids_BT=torch.randint(5, vocabulary - 1, (batch, width), generator=generator),
        attention_mask_BT=(torch.arange(width) < lengths[:, None]).long(),
        valid_B=torch.ones(batch, dtype=torch.bool),
        rows_B=torch.arange(batch),
        image_BPD=torch.randn(batch, recipe["patches"], recipe["width"], generator=generator),
    )
    return whole.at(torch.tensor(rows))


class Way:
    """One way to train, ready to do steps."""

    def __init__(self, way: str, recipe: dict[str, Any], virtual_ranks: int) -> None:
        rank = LocalContext().rank
        torch.manual_seed(0)
        qformer = QFormer(QFormerConfig(**recipe["qformer"], dropout=0.1), recipe["width"])
        self._model = Stage1Model(None, qformer, Stage1LossConfig(max_text_tokens=recipe["tokens"])).train()
        self._micro = recipe["micro"]
        config = StageConfig(
            steps=1, global_batch_size=recipe["batch"], micro_batch_size=self._micro, deepspeed="stage1_zero1"
        )
        self.engine: Engine = build_engine(self._model, config, rank, virtual_ranks if way == "tree" else None)
        self._virtual = [] if way == "ordinary" else virtual_ranks_of(rank.rank, rank.world_size, virtual_ranks)
        parts = virtual_ranks if self._virtual else rank.world_size
        rows = [row for part in self._virtual or [rank.rank] for row in range(part, recipe["batch"], parts)]
        self._inputs, self._communicator = inputs_of(recipe, rows), make_communicator(rank.world_size)
        self.update_seconds: list[float] = []

    def bytes_of_update(self) -> dict[str, float]:
        """Do a step; return the megabytes in the collectives of its update."""
        self._losses(1)
        with Collectives() as counted:
            self.engine.step(1e-4)
        return counted.megabytes

    def step(self, number: int) -> float:
        """Do a step; return its CPU seconds."""
        began = time.process_time()
        self._losses(number)
        reduced = time.process_time()
        self.engine.step(1e-4)
        ended = time.process_time()
        self.update_seconds.append(ended - reduced)
        return ended - began

    def _losses(self, number: int) -> None:
        self._model.loss_and_backward(
            self._inputs,
            StepContext(
                self._communicator,
                self._micro,
                step=number,
                backward=self.engine.backward,
                virtual_ranks=self._virtual,
                end_micro_batch=self.engine.end_micro_batch,
            ),
        )


class Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's class is not annotated
    """Adds up the bytes of the larger side of each collective that starts while it is active, by its name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.megabytes: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; count it where it is one of c10d."""
        if func.namespace == "c10d" and (size := max(map(_bytes, args))):
            name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else str(func).split(".")[1]
            self.megabytes[name] = self.megabytes.get(name, 0.0) + size / 1e6
        return func(*args, **(kwargs or {}))


def _bytes(arg: Any) -> int:
    if isinstance(arg, Tensor):
        return arg.nbytes
    return sum(map(_bytes, arg)) if isinstance(arg, list | tuple) else 0


def measure(_rank: int, _world_size: int, name: str, virtual_ranks: int, steps: int) -> dict[str, dict[str, float]]:
    """Measure every way twice, there and back."""
    torch.set_num_threads(1)
    found: dict[str, dict[str, list[float]]] = {way: {} for way in WAYS}
    for way in (*WAYS, *reversed(WAYS)):
        chosen = Way(way, RECIPES[name], virtual_ranks)
        with closing(chosen.engine):
            collectives = chosen.bytes_of_update()
            watched = Watched(lambda chosen=chosen: chosen.step(1))  # type: ignore[misc]
            chosen.update_seconds.clear()
            wall = time.monotonic()
            seconds = [chosen.step(2 + i) for i in range(steps)]
            figures = {
                "CPU seconds": seconds,
                "CPU seconds of the update": chosen.update_seconds,
                "wall seconds": [(time.monotonic() - wall) / steps],
                "growth of memory MB": [watched.figures["anonymous peak MB"]],
                **{f"MB in {name}": [size] for name, size in collectives.items()},
            }
        for key, values in figures.items():
            found[way].setdefault(key, []).extend(values)
    drain_gloo()
    return {way: {key: statistics.median(values) for key, values in figures.items()} for way, figures in found.items()}


def main() -> None:
    """Print a table of each recipe and number of ranks as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", choices=RECIPES, nargs="*", default=list(RECIPES))
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4])
    parser.add_argument(
        "--virtual", type=int, nargs="*", default=[], help="virtual ranks (default: as many as ranks, and 4)"
    )
    parser.add_argument("--steps", type=int, default=5)
    given = parser.parse_args()
    for recipe in given.recipe:
        for ranks in given.ranks:
            for virtual in given.virtual or sorted({ranks, 4}):
                results = run_ranks(measure, ranks, recipe, virtual, given.steps, timeout_seconds=LIMIT_SECONDS)
                place = {"recipe": recipe, "ranks": ranks, "virtual ranks": virtual}
                print(json.dumps(place | {way: _rounded(figures) for way, figures in results[0].items()}), flush=True)


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {key: float(f"{value:.4g}") for key, value in figures.items()}


if __name__ == "__main__":
    main()
