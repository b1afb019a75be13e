"""Where and in which precision a forward pass runs: all that an evaluation needs of an engine."""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch


class Precision(Protocol):
    """Device and precision; an engine is one."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        ...

    def autocast(self) -> AbstractContextManager[None]:
        """Compute in the precision inside the block."""
        ...


class Unscaled(NamedTuple):
    """A model as it was loaded, without an engine."""

    device: torch.device

    def autocast(self) -> AbstractContextManager[None]:
        """Compute in the types of the model's tensors."""
        return nullcontext()
