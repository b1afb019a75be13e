"""Small states, managers and a killable saver for tests of checkpoints."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from isthmus.data_pipeline.config import StoreConfig
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.trainer.checkpoint.commit import Ownership
from isthmus.trainer.checkpoint.manager import CheckpointManager
from isthmus.trainer.checkpoint.replica_buffer import PeerMemory
from isthmus.trainer.checkpoint.train_state import TrainState
from isthmus.trainer.config.schema import CheckpointConfig
from isthmus.trainer.context import Rank
from isthmus.trainer.engine.state_shards import KINDS, Fragment
from tests.faulty_store import Fault, FaultyStore

SHAPES = {"qformer.a": (7, 5), "qformer.temperature": (), "projection.b": (11,)}


def full(step: int) -> dict[tuple[str, str], torch.Tensor]:
    """Every tensor of the state after `step` steps."""
    return {
        (name, kind): torch.arange(float(torch.Size(shape).numel())) + 100 * step + i
        for name, shape in SHAPES.items()
        for i, kind in enumerate(KINDS)
    }


def fragments_of(step: int, rank: int = 0, world_size: int = 1) -> list[Fragment]:
    """One rank's share: each tensor is cut into nearly equal parts."""
    found = []
    for (name, kind), data in full(step).items():
        cuts = [data.numel() * r // world_size for r in range(world_size + 1)]
        piece = data[cuts[rank] : cuts[rank + 1]]
        if piece.numel():
            found.append(Fragment(name, kind, SHAPES[name], cuts[rank], piece))
    return found


def state_of(step: int, **changes: Any) -> TrainState:
    return TrainState(**{"stage": "stage1", "step": step, "config_hash": "c", "data_identity": "d"} | changes)


def manager(
    folder: str,
    store: ObjectStore | None = None,
    rank: Rank | None = None,
    assert_owner: Callable[[], None] = lambda: None,
    token: int = 1,
    peers: PeerMemory | None = None,
    **config: Any,
) -> CheckpointManager:
    settings = {"save_timeout_seconds": 20.0, **config}
    place = rank or Rank(0, 1)
    chosen = CheckpointConfig(**settings)
    ownership = Ownership(token, assert_owner)
    return CheckpointManager(folder, store or ObjectStore(), chosen, place, ownership, peers=peers)


def holds(saved: Any, step: int) -> bool:
    """Whether a checkpoint holds exactly the state after `step` steps."""
    return saved.step == step and all(
        torch.equal(saved.read(n, k, 0, t.numel()), t) for (n, k), t in full(step).items()
    )


def main(folder: str, journal: str, kind: str, at_write: int, steps: int) -> None:
    """Save a few steps through a faulty store, in a process that the fault may kill."""
    store = FaultyStore(StoreConfig(), Path(journal), Fault(kind, at_write), os.getpid())  # type: ignore[arg-type]
    checkpoints = manager(folder, store, save_timeout_seconds=30.0)
    saved = checkpoints.latest()
    for step in range(saved.step + 1 if saved else 1, steps + 1):
        checkpoints.save(step, fragments_of(step), state_of(step))
        checkpoints.wait()
    checkpoints.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
