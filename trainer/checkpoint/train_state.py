"""The state of a checkpoint besides its tensors."""

import dataclasses
import importlib.metadata
import logging
import platform
from dataclasses import dataclass, field
from typing import Any

from isthmus.trainer.errors import CheckpointError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainState:
    """The scalars of a saved state: where training is, and what is trained.

    A field that a later release adds needs a default, under which older checkpoints are read.
    """

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
    skipped_steps: list[list[int]] = field(default_factory=list)
    """Ranges [first, last] of steps of the sample order that were skipped before this step."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Figures of an evaluation at this step, if there was one."""

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(raw: dict[str, Any], url: str) -> "TrainState":
        """Return the state that `url` holds as plain data.

        Absent fields take their defaults. Unknown fields are ignored: what a reader must not ignore raises the format
        version instead.

        Raises:
            CheckpointError: a field without a default is absent, or one has another type.
        """
        known = {item.name: item for item in dataclasses.fields(TrainState)}
        required = {name for name, item in known.items() if _has_no_default(item)}
        if absent := sorted(required - raw.keys()):
            raise CheckpointError(f"{url}: lacks {', '.join(absent)}; the file is damaged, restore it from a copy")
        if unknown := sorted(raw.keys() - known.keys()):
            logger.info("%s: ignores %s, written by another release", url, ", ".join(unknown))
        state = TrainState(**{name: value for name, value in raw.items() if name in known})
        if type(state.step) is not int or not isinstance(state.frozen_identity, dict):
            raise CheckpointError(f"{url}: step or frozen_identity has the wrong type; the file is damaged")
        return state


def _has_no_default(item: "dataclasses.Field[Any]") -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def versions() -> dict[str, str]:
    """Return the versions of what computes the state."""
    found = {"python": platform.python_version()}
    for name in ("isthmus", "torch", "deepspeed"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found
