"""DeepSpeed holds and updates the trainable part.

Parameters stay fp32; bf16 and fp16 are autocast, so there is one copy of the state at any precision.
Gradients of all `backward` calls of a step add up on the rank and are reduced once, in `step` (`update.py`).
"""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from isthmus.model.config import STORAGE_TYPES
from isthmus.trainer.config.schema import StageConfig
from isthmus.trainer.context import Rank
from isthmus.trainer.engine.deepspeed_config import trainable_config
from isthmus.trainer.engine.deepspeed_workarounds import load_deepspeed, without_broadcast
from isthmus.trainer.engine.optimizer import ClippedAdamW, clip_factor, parameter_groups
from isthmus.trainer.engine.process_group import select_device
from isthmus.trainer.engine.state_shards import (
    KINDS,
    Fragment,
    StateReader,
    check_shapes,
    flat_tensors,
    places,
    refresh_working_copies,
)
from isthmus.trainer.engine.update import DeepSpeedUpdate, TreeUpdate, pad_groups
from isthmus.trainer.errors import ConfigError, TrainerError

_LOSS_SCALE_START = 2.0**16
_LOSS_SCALE_GROWTH_STEPS = 2000
_LOSS_SCALE_MAX = 2.0**24


@dataclass(frozen=True)
class Precision:
    """Device and compute type of a stage's forward passes."""

    device: torch.device
    dtype: torch.dtype = torch.float32

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass; gradients, scores and metrics are computed outside of it."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)


@dataclass(frozen=True)
class StepResult:
    """What a step did; equal on all ranks."""

    applied: bool
    """False: a loss or gradient was not finite on some rank; the step was skipped on all of them."""
    norm: Tensor
    """Global norm of the gradient before clipping, 0-d on the device; infinite where not applied."""
    scale_falls: bool = False
    """fp16: not applied, and the loss scale could still be halved."""

    @property
    def grad_norm(self) -> float:
        """The norm as a number; waits for the device."""
        return float(self.norm)


class Engine:
    """Accumulates gradients, reduces over ranks, clips, updates; saves and restores its state in pieces."""

    def __init__(
        self,
        module: Any,
        wrapped: Any,
        optimizer: ClippedAdamW,
        stage_config: StageConfig,
        rank: Rank,
        device: torch.device,
        virtual_ranks: int | None,
    ) -> None:
        """Use `build_engine`."""
        self.module = module
        self.device = device
        self.precision = Precision(device, getattr(torch, STORAGE_TYPES[stage_config.precision]))
        self.rank = rank
        self.loss_scale = _LOSS_SCALE_START if stage_config.precision == "fp16" else None
        self._parameters: dict[str, nn.Parameter] = module.trainable_parameters()
        self._wrapped = wrapped
        self._zero = wrapped.optimizer
        self._optimizer = optimizer
        self._max_norm = stage_config.optimizer.max_grad_norm
        self._steps = 0
        self._seen_backward = False
        optimizer.gradient_factor = self._gradient_factor
        self._fill_state(step=0)
        self._update: DeepSpeedUpdate | TreeUpdate = (
            TreeUpdate(self._zero, optimizer, virtual_ranks)
            if virtual_ranks
            else DeepSpeedUpdate(wrapped, self._parameters, rank.world_size)
        )

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, a scalar; over all calls and ranks contributions sum up.

        May be called any number of times per step. A loss that is not finite skips the step on all ranks.
        """
        self._seen_backward = True
        # A NaN factor makes the global norm NaN on all ranks without a collective.
        factor = torch.where(torch.isfinite(loss.detach()), self.loss_scale or 1.0, float("nan"))
        with torch.autocast(self.device.type, enabled=False):
            self._update.backward(loss * factor.to(loss.dtype))

    def end_micro_batch(self) -> None:
        """Say that the gradient of a micro-batch is complete: sums in a fixed order are sums over micro-batches."""
        self._update.end_micro_batch()

    def step(self, lr: float) -> StepResult:
        """Reduce, agree, clip and update with learning rate `lr`. Collective.

        Raises:
            TrainerError: `backward` was not called since the last step.
        """
        if not self._seen_backward:
            raise TrainerError("step without backward: every rank must call Engine.backward before Engine.step")
        self._seen_backward = False
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        applied = self._update.step()
        self._steps += 1
        if not applied:
            self._count_steps()
        found = self._update.norm if applied else math.inf
        norm = torch.as_tensor(found, dtype=torch.float32, device=self.device) / (self.loss_scale or 1.0)
        scale = self.loss_scale
        self._adapt_loss_scale(applied)
        scale_falls = scale is not None and self.loss_scale is not None and self.loss_scale < scale
        return StepResult(applied, norm, scale_falls)

    def fragments(self) -> list[Fragment]:
        """Return views of this rank's pieces; over all ranks every element of every tensor exactly once."""
        return [
            Fragment(place.name, kind, place.shape, place.offset, place.view(self._tensor(place.flat, kind)))
            for place in places(self._zero, self._parameters)
            for kind in KINDS
        ]

    def num_parameters(self) -> int:
        """Return how many numbers are trained, over all ranks."""
        return sum(math.prod(_full_shape(parameter)) for parameter in self._parameters.values())

    @torch.no_grad()
    def restore(self, reader: StateReader, step: int, loss_scale: float | None = None) -> None:
        """Load the state after `step` steps, saved at any world size and ZeRO stage. Collective.

        Raises:
            CheckpointError: the state is of another model.
        """
        expected = {name: _full_shape(parameter) for name, parameter in self._parameters.items()}
        check_shapes(reader.shapes(), expected)
        for fragment in self.fragments():
            fragment.data.copy_(reader.read(fragment.name, fragment.kind, fragment.offset, fragment.data.numel()))
        self._steps = step
        self._wrapped.global_steps = step
        self._count_steps()
        if self.loss_scale is not None and loss_scale is not None:
            self.loss_scale = loss_scale
        refresh_working_copies(self._zero)

    def close(self) -> None:
        """Free what DeepSpeed holds; a step under way is dropped without a collective."""
        self._update.close()
        self._wrapped.destroy()

    def _gradient_factor(self) -> Tensor | float:
        scale = self.loss_scale or 1.0
        return clip_factor(self._update.norm / scale, self._max_norm, scale)

    def _fill_state(self, step: int) -> None:
        """Make the optimizer's state, which it would otherwise make in its first step."""
        for flat in flat_tensors(self._zero):
            self._optimizer.state[flat] = {
                "step": torch.tensor(float(step), device=flat.device if self._optimizer.defaults["fused"] else "cpu"),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }

    def _count_steps(self) -> None:
        """Let AdamW count skipped steps too: then the bias correction is a function of the step alone."""
        for state in self._optimizer.state.values():
            state["step"].fill_(float(self._steps))

    def _tensor(self, flat: nn.Parameter, kind: str) -> Tensor:
        state: dict[str, Tensor] = self._optimizer.state[flat]
        return flat if kind == "param" else state[kind]

    def _adapt_loss_scale(self, applied: bool) -> None:
        """Halve after a skipped step, double every so many steps; needs no state but the scale itself."""
        if self.loss_scale is None:
            return
        if not applied:
            self.loss_scale = max(1.0, self.loss_scale / 2)
        elif self._steps % _LOSS_SCALE_GROWTH_STEPS == 0:
            self.loss_scale = min(_LOSS_SCALE_MAX, self.loss_scale * 2)


def build_engine(
    task_model: nn.Module,
    stage_config: StageConfig,
    rank: Rank,
    virtual_ranks: int | None = None,
    *,
    initialize: bool = True,
) -> Engine:
    """Move the model to this rank's device and put its trainable part under DeepSpeed. Collective.

    Args:
        task_model: A module whose `trainable_parameters` names what the stage optimises. A frozen language model made
            by `load_frozen_lm` inside it has an engine of its own.
        stage_config: Template, precision and optimizer.
        rank: Place of this process in the process group, which exists already.
        virtual_ranks: Add their gradients in a fixed order: the same bits on any number of ranks; None means any
            order.
        initialize: Give all ranks the values of rank 0. False: `restore` follows.

    Raises:
        ConfigError: the template does not fit virtual ranks.
        TrainerError: the device does not fit the precision.
    """
    device = _prepare_device(rank, stage_config)
    task_model.to(device)
    parameters: dict[str, nn.Parameter] = task_model.trainable_parameters()  # type: ignore[operator]
    deepspeed_config, schedule = trainable_config(stage_config.deepspeed), stage_config.optimizer
    offloaded = deepspeed_config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
    groups = parameter_groups(parameters, schedule.weight_decay, schedule.lr_factors)
    padding = _prepare_tree(groups, deepspeed_config, virtual_ranks) if virtual_ranks else []
    optimizer = ClippedAdamW(groups, schedule, fused=device.type == "cuda" and not offloaded)
    if initialize:
        for parameter in parameters.values():
            dist.broadcast(parameter.data, src=0)
    trained = _trainable_module(task_model, [*parameters.values(), *padding], deepspeed_config)
    with without_broadcast(deepspeed := load_deepspeed()):
        wrapped, *_ = deepspeed.initialize(
            model=trained, optimizer=optimizer, config=deepspeed_config, dist_init_required=False
        )
    return Engine(task_model, wrapped, optimizer, stage_config, rank, device, virtual_ranks)


def _prepare_device(rank: Rank, stage_config: StageConfig) -> torch.device:
    device = select_device(rank)
    if device.type == "cuda":
        _check_bf16(device, stage_config)
        allow_tf32(enabled=stage_config.precision == "tf32")
    return device


def allow_tf32(*, enabled: bool) -> None:
    """Let CUDA round operands of fp32 products and convolutions to TF32, or not; torch's defaults for them differ."""
    torch.set_float32_matmul_precision("high" if enabled else "highest")
    torch.backends.cudnn.allow_tf32 = enabled


def _check_bf16(device: torch.device, stage_config: StageConfig) -> None:
    if stage_config.precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise TrainerError(
            f"{torch.cuda.get_device_name(device)} has no bf16; set stage1.precision and stage2.precision to fp16"
        )


def _prepare_tree(
    groups: list[dict[str, Any]], deepspeed_config: dict[str, Any], virtual_ranks: int
) -> list[nn.Parameter]:
    """Make DeepSpeed's layout one that virtual ranks can share; return the parameters that pad it."""
    zero = deepspeed_config["zero_optimization"]
    if zero["stage"] == 3:
        raise ConfigError(
            "safety.same_bits: world_size needs a DeepSpeed template of stage 1 or 2 for the trainable part, not 3; "
            "use stage1_zero1, or set safety.same_bits: run"
        )
    deepspeed_config["zero_optimization"] = {**zero, "round_robin_gradients": False}  # would reorder by world size
    return pad_groups(groups, virtual_ranks)


def _trainable_module(model: nn.Module, parameters: list[nn.Parameter], config: dict[str, Any]) -> nn.Module:
    """Return what DeepSpeed sees: under ZeRO-1 and 2 just the tensors, under ZeRO-3 the modules that fetch them."""
    if config["zero_optimization"]["stage"] < 3:
        return nn.ParameterList(parameters)
    wanted = set(map(id, parameters))
    if any(id(parameter) in wanted for parameter in model.parameters(recurse=False)):
        raise TrainerError(
            "deepspeed: stage 3 needs every trainable parameter of the model in a submodule; use a template of stage 1"
        )
    children = [c for c in model.children() if any(id(p) in wanted for p in c.parameters())]
    return nn.ModuleList(children)


def _full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
