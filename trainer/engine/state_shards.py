"""The trainable state as flat fp32 pieces with their offsets, independent of world size and ZeRO stage.

Every piece is a view into the optimizer's own memory: reading them gathers nothing and copies nothing.
The attributes of DeepSpeed's optimizers used here are internal to it: its version is pinned, and tests watch them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch.distributed as dist
from torch import Tensor, nn

from isthmus.trainer.errors import CheckpointError

Kind = Literal["param", "exp_avg", "exp_avg_sq"]
KINDS: tuple[Kind, ...] = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """A contiguous piece of one full tensor."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    """Shape of the full tensor."""
    offset: int
    """Place of the first element in the flattened full tensor."""
    data: Tensor
    """1-D fp32 view; changes with the next step."""


class StateReader(Protocol):
    """Where `Engine.restore` reads the state from."""

    def read(self, name: str, kind: str, offset: int, length: int) -> Tensor:
        """Return elements [offset, offset + length) of the flattened tensor: 1-D fp32 on the CPU."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every trainable tensor in the saved state."""
        ...


@dataclass(frozen=True)
class Place:
    """Where this rank keeps a piece of a parameter: elements [start, start + length) of `flat`."""

    name: str
    shape: tuple[int, ...]
    offset: int
    flat: nn.Parameter
    """One of the tensors that the wrapped optimizer updates."""
    start: int
    length: int

    def view(self, tensor: Tensor) -> Tensor:
        """Return the piece of `tensor`, which is `flat` or one of its moments."""
        return tensor.detach().narrow(0, self.start, self.length)


def places(zero_optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> Iterator[Place]:
    """Yield where this rank keeps its piece of each parameter; parameters of which it has none are left out."""
    partitioned = hasattr(zero_optimizer, "fp32_partitioned_groups_flat")
    for name, parameter in parameters.items():
        place = (_place_zero3 if partitioned else _place_zero12)(zero_optimizer, name, parameter)
        if place is not None and place.length > 0:
            yield place


def flat_tensors(zero_optimizer: Any) -> list[nn.Parameter]:
    """Return the flat fp32 tensors that the wrapped optimizer updates on this rank."""
    if hasattr(zero_optimizer, "fp32_partitioned_groups_flat"):
        return list(zero_optimizer.fp32_partitioned_groups_flat)
    return list(zero_optimizer.single_partition_of_fp32_groups)


def refresh_working_copies(zero_optimizer: Any) -> None:
    """Bring the tensors that the network computes with up to date with the fp32 master pieces. Collective."""
    if not hasattr(zero_optimizer, "fp32_partitioned_groups_flat"):
        zero_optimizer.update_lp_params()
        return
    zero_optimizer._partition_all_parameters()
    for i in range(len(zero_optimizer.fp16_groups)):
        zero_optimizer._reassign_or_swap_out_partitioned_parameters(i)
    if zero_optimizer.persistent_parameters:
        zero_optimizer.persistent_parameters[0].all_gather(zero_optimizer.persistent_parameters)


def _place_zero12(zero_optimizer: Any, name: str, parameter: Any) -> Place | None:
    """ZeRO-1 and 2 flatten a whole group and give each rank a contiguous part, which may begin inside a parameter."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
    flat = zero_optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    return Place(name, tuple(parameter.shape), here.start, flat, there.start, here.numel)


def _place_zero3(zero_optimizer: Any, name: str, parameter: Any) -> Place:
    """ZeRO-3 pads each parameter and gives each rank an equal part of it; the padding is at the end."""
    group, start, part = zero_optimizer.grad_position[zero_optimizer.get_param_id(parameter)]
    offset = part * dist.get_rank()
    length = max(0, min(part, parameter.ds_numel - offset))
    flat = zero_optimizer.fp32_partitioned_groups_flat[group]
    return Place(name, tuple(parameter.ds_shape), offset, flat, start, length)


def check_shapes(saved: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the tensors of a saved state with those of the model.

    Raises:
        CheckpointError: a tensor is missing, extra or of another shape; all are named.
    """
    missing = sorted(expected.keys() - saved.keys())
    extra = sorted(saved.keys() - expected.keys())
    changed = [
        f"{name}: saved {tuple(saved[name])}, model {shape}"
        for name, shape in expected.items()
        if name in saved and tuple(saved[name]) != shape
    ]
    if missing or extra or changed:
        raise CheckpointError(
            "the checkpoint is of another model: "
            f"missing {missing or 'none'}; not in the model {extra or 'none'}; of another shape {changed or 'none'}; "
            "resume with the configuration that wrote it, or start a new run"
        )
