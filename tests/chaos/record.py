"""What a rank notes of its training, for the comparison: which samples each step had, and when."""

import json
import time
from pathlib import Path
from typing import Any

from isthmus.trainer import task


def record_steps(path: Path, attempt: int, rank: int) -> None:
    """Append a line for every step that is trained in this process: when, which samples, in which epochs."""
    train_step = task.Task.train_step
    path.parent.mkdir(exist_ok=True)

    def recording(self: Any, batch: Any, *others: Any) -> Any:
        line = {
            "attempt": attempt,
            "rank": rank,
            "stage": self.name,
            "step": batch.step,
            "rows": batch.rows_B.tolist(),
            "keys": batch.keys,
            "valid": batch.valid_B.tolist(),
            "positions": batch.positions,
            "time": time.monotonic(),
        }
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return train_step(self, batch, *others)

    task.Task.train_step = recording  # type: ignore[method-assign]
