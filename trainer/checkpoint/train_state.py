"""What a checkpoint knows besides its tensors."""

import importlib.metadata
import platform
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from isthmus.trainer.engine.state_shards import Fragment, StateReader
from isthmus.trainer.errors import CheckpointError

__all__ = ["Fragment", "StateReader", "TrainState", "versions"]


@dataclass(frozen=True)
class TrainState:
    """The scalars of a saved state: where training is, and of what it is the training."""

    stage: str
    step: int
    """Steps done; the schedule and the data position are functions of it."""
    config_hash: str
    data_identity: str
    """Hash of the sample order: manifests, weights, seed, batch, lanes."""
    frozen_identity: dict[str, str] = field(default_factory=dict)
    """sha256 by frozen part."""
    loss_scale: float | None = None
    """fp16 only."""
    versions: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    """Figures of an evaluation at this step, if there was one."""

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    @staticmethod
    def from_json(raw: dict[str, Any], url: str) -> "TrainState":
        """Check plain data read from `url`.

        Raises:
            CheckpointError: a field is missing or unknown.
        """
        known = {item.name for item in fields(TrainState)}
        if not isinstance(raw, dict) or set(raw) != known:
            found = sorted(raw) if isinstance(raw, dict) else type(raw).__name__
            raise CheckpointError(f"{url}: holds {found} where {sorted(known)} are expected; it is damaged")
        return TrainState(**raw)


def versions() -> dict[str, str]:
    """Return the versions of what computes the state."""
    packages = ("isthmus", "torch", "deepspeed")
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found
