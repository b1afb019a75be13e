"""Decay groups, the learning rate as a function of the step, and AdamW that clips and unscales (BLIP-2, appendix A)."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.trainer.config.schema import OptimizerConfig
from isthmus.trainer.errors import ConfigError


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine from the peak to the floor.

    Args:
        config: Peak, floor and warm-up.
        step: Optimizer step, from 0.
        num_steps: Steps of the stage; the floor is reached at the last one.
    """
    if step < config.warmup_steps:
        rise = step / config.warmup_steps
        return config.warmup_start_lr + (config.peak_lr - config.warmup_start_lr) * rise
    num_cosine_steps = max(1, num_steps - 1 - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / num_cosine_steps)
    return config.min_lr + (config.peak_lr - config.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def parameter_groups(
    parameters: Mapping[str, nn.Parameter], weight_decay: float, lr_factors: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Group parameters by decay and by the factor of their learning rate, kept as `lr_factor` of the group.

    Matrices (query tokens among them) decay; vectors, scalars (the learned temperature) and biases do not, as in the
    original code (LAVIS, base_model.py: `p.ndim < 2`).

    Args:
        parameters: by name.
        weight_decay: of those that decay.
        lr_factors: factor by beginning of the name; the longest that fits counts, 1 where none does.

    Raises:
        ConfigError: a factor for names that no parameter has.
    """
    factors = lr_factors or {}
    for prefix in factors:
        if not any(name.startswith(prefix) for name in parameters):
            known = ", ".join(sorted({name.split(".")[0] for name in parameters}))
            raise ConfigError(f"optimizer.lr_factors: no parameter begins with {prefix!r}; this stage trains {known}")
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        fitting = max((prefix for prefix in factors if name.startswith(prefix)), key=len, default="")
        groups.setdefault((factors.get(fitting, 1.0), _decays(name, parameter)), []).append(parameter)
    return [
        {"params": members, "weight_decay": weight_decay if decays else 0.0, "lr_factor": factor}
        for (factor, decays), members in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]


def _decays(name: str, parameter: nn.Parameter) -> bool:
    # Under ZeRO-3 a parameter's own shape is that of its partition; ds_shape is the true one.
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return len(shape) > 1 and not name.endswith(".bias")


class ClippedAdamW(torch.optim.AdamW):
    """AdamW whose gradients are multiplied by `gradient_factor()` first: unscaling and clipping in one pass."""

    def __init__(self, groups: Iterable[dict[str, Any]], config: OptimizerConfig, *, fused: bool) -> None:
        super().__init__(groups, lr=config.peak_lr, betas=config.betas, eps=config.eps, fused=fused)
        self.gradient_factor: Callable[[], Tensor | float] = lambda: 1.0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Scale the gradients of the current groups in place, then update."""
        assert closure is None
        factor = self.gradient_factor()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        super().step()


def clip_factor(norm: Tensor | float, max_norm: float, scale: float) -> Tensor | float:
    """Return the factor that unscales gradients, whose unscaled norm is `norm`, and clips them to `max_norm`."""
    if max_norm <= 0:
        return 1.0 / scale
    clipped = max_norm / (norm + 1e-6)
    if isinstance(clipped, Tensor):
        return clipped.clamp(max=1.0) / scale
    return min(1.0, clipped) / scale
