"""A small model, a training loop and a state store in memory for tests of the engine."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.trainer.config.schema import StageConfig
from isthmus.trainer.context import LocalContext
from isthmus.trainer.engine.engine import Engine, build_engine

WIDTH = 10
BATCH = 12
LR_FACTORS = {"body.second": 2.0}


class Body(nn.Module):
    """Odd sizes on purpose: no tensor divides evenly over ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(3, WIDTH))
        self.first = nn.Linear(WIDTH, 17)
        self.norm = nn.LayerNorm(17)
        self.second = nn.Linear(17, 7)
        self.frozen = nn.Linear(7, 7).requires_grad_(requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        mixed = x + torch.softmax(x @ self.queries.T, dim=-1) @ self.queries
        return self.frozen(self.second(F.gelu(self.norm(self.first(mixed)))))


class Toy(nn.Module):
    """Regression with a learned scalar; what the engine sees of a task."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.body = Body()

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Sum over rows, divided by the GLOBAL batch: contributions of micro-batches and ranks add up."""
        return F.mse_loss(self.body(x), y, reduction="sum") / BATCH


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    """The global batch of a step."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(BATCH, WIDTH, generator=generator), torch.randn(BATCH, 7, generator=generator)


def stage_config(deepspeed: str, **changes: Any) -> StageConfig:
    sizes = {"steps": 20, "global_batch_size": BATCH, "micro_batch_size": 2}
    return StageConfig(**sizes | {"deepspeed": deepspeed} | changes)


def make_engine(
    deepspeed: str, model: nn.Module | None = None, virtual_ranks: int | None = None, **changes: Any
) -> Engine:
    if model is None:
        changes = {"optimizer": {"lr_factors": LR_FACTORS}} | changes
    return build_engine(model or Toy(), stage_config(deepspeed, **changes), LocalContext().rank, virtual_ranks)


def accumulate(engine: Engine, step: int, num_micro_batches: int = 2) -> None:
    """Backward of this rank's rows in micro-batches."""
    rank, world = engine.rank.rank, engine.rank.world_size
    x, y = (t[rank * BATCH // world : (rank + 1) * BATCH // world].to(engine.device) for t in batch_of(step))
    for x_part, y_part in zip(x.chunk(num_micro_batches), y.chunk(num_micro_batches), strict=True):
        engine.backward(engine.module.loss(x_part, y_part))


def train(engine: Engine, start: int, stop: int) -> list[float]:
    """Train steps [start, stop) with a varying learning rate; return the gradient norms."""
    norms = []
    for step in range(start, stop):
        accumulate(engine, step)
        norms.append(engine.step(lr=1e-2 / (step + 1)).grad_norm)
    return norms


Pieces = list[tuple[str, str, tuple[int, ...], int, np.ndarray]]


def pieces_of(engine: Engine) -> Pieces:
    """Copies of a rank's fragments in a form that crosses processes."""
    return [(f.name, f.kind, f.shape, f.offset, f.data.clone().numpy()) for f in engine.fragments()]


class MemoryState:
    """Full tensors put together from the pieces of all ranks; a StateReader."""

    def __init__(self, ranks: list[Pieces]) -> None:
        self.full: dict[tuple[str, str], Tensor] = {}
        self.covered: dict[tuple[str, str], Tensor] = {}
        for name, kind, shape, offset, data in (piece for rank in ranks for piece in rank):
            size = torch.Size(shape).numel()
            full = self.full.setdefault((name, kind), torch.full((size,), float("nan")))
            covered = self.covered.setdefault((name, kind), torch.zeros(size, dtype=torch.int64))
            full[offset : offset + data.size] = torch.from_numpy(data)
            covered[offset : offset + data.size] += 1
        self._shapes = {piece[0]: piece[2] for rank in ranks for piece in rank}

    def read(self, name: str, kind: str, offset: int, length: int) -> Tensor:
        return self.full[name, kind][offset : offset + length]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes
