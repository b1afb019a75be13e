"""Learning rate, decay groups, and clipping and unscaling inside AdamW."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from isthmus.trainer.config.schema import OptimizerConfig
from isthmus.trainer.engine.optimizer import ClippedAdamW, clip_factor, learning_rate, parameter_groups
from isthmus.trainer.errors import ConfigError

pytestmark = pytest.mark.unit
CONFIG = OptimizerConfig(peak_lr=1e-4, min_lr=1e-5, warmup_start_lr=1e-6, warmup_steps=10)


def test_schedule_has_its_corner_points() -> None:
    assert learning_rate(CONFIG, 0, 101) == 1e-6
    assert learning_rate(CONFIG, 5, 101) == pytest.approx((1e-6 + 1e-4) / 2)
    assert learning_rate(CONFIG, 10, 101) == 1e-4
    assert learning_rate(CONFIG, 55, 101) == pytest.approx((1e-4 + 1e-5) / 2)
    assert learning_rate(CONFIG, 100, 101) == pytest.approx(1e-5)


@given(step=st.integers(0, 400), num_steps=st.integers(1, 300), warmup=st.integers(0, 300))
def test_schedule_stays_within_bounds_and_falls_after_warm_up(step: int, num_steps: int, warmup: int) -> None:
    config = CONFIG.model_copy(update={"warmup_steps": warmup})
    now, then = learning_rate(config, step, num_steps), learning_rate(config, step + 1, num_steps)
    assert 1e-6 <= now <= 1e-4
    assert then >= now if step < warmup else then <= now


def test_matrices_and_queries_decay_and_vectors_do_not() -> None:
    parameters = {
        "queries": nn.Parameter(torch.zeros(1, 3, 4)),
        "linear.weight": nn.Parameter(torch.zeros(4, 4)),
        "linear.bias": nn.Parameter(torch.zeros(4)),
        "norm.weight": nn.Parameter(torch.zeros(4)),
        "odd.bias": nn.Parameter(torch.zeros(2, 2)),
        "temperature": nn.Parameter(torch.zeros(())),
    }
    decayed, exempt = parameter_groups(parameters, 0.05)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.05, 0.0)
    assert [len(group["params"]) for group in (decayed, exempt)] == [2, 4]
    assert any(p is parameters["queries"] for p in decayed["params"])


def test_no_empty_group_is_made() -> None:
    assert len(parameter_groups({"bias": nn.Parameter(torch.zeros(2))}, 0.05)) == 1


def test_the_longest_beginning_of_a_name_gives_the_factor() -> None:
    names = ("qformer.queries", "qformer.ln.weight", "projection.weight", "projection.bias")
    parameters = {name: nn.Parameter(torch.zeros(2) if name.endswith(("bias", "ln.weight")) else torch.zeros(2, 2))
                  for name in names}  # fmt: skip
    groups = parameter_groups(parameters, 0.05, {"projection": 10.0, "projection.bias": 3.0})
    found = {id(member): (group["lr_factor"], group["weight_decay"]) for group in groups for member in group["params"]}
    assert [found[id(parameters[name])] for name in names] == [(1.0, 0.05), (1.0, 0.0), (10.0, 0.05), (3.0, 0.0)]
    assert len(groups) == len({(group["lr_factor"], group["weight_decay"]) for group in groups})


def test_a_factor_for_nothing_names_what_there_is() -> None:
    parameters = {"qformer.queries": nn.Parameter(torch.zeros(2, 2)), "projection.bias": nn.Parameter(torch.zeros(2))}
    with pytest.raises(ConfigError, match=r"no parameter begins with 'projektion'; this stage trains projection, qfo"):
        parameter_groups(parameters, 0.05, {"projektion": 10.0})


@given(norm=st.floats(1e-3, 1e3), max_norm=st.floats(0.1, 10.0), scale=st.sampled_from([1.0, 2.0**16]))
def test_clip_factor_unscales_and_bounds_the_norm(norm: float, max_norm: float, scale: float) -> None:
    for given_norm in (norm, torch.tensor(norm, dtype=torch.float64)):
        result = norm * scale * float(clip_factor(given_norm, max_norm, scale))
        assert result <= max_norm * (1 + 1e-9)
        assert result == pytest.approx(min(norm, max_norm), rel=2e-3 if norm < 1 else 1e-5)
    assert clip_factor(norm, 0.0, scale) == 1.0 / scale


def test_step_equals_clipping_and_then_adamw() -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(5, 5)) for _ in range(2))
    clipped = ClippedAdamW([{"params": [ours], "weight_decay": 0.05}], CONFIG, fused=False)
    plain = torch.optim.AdamW([theirs], lr=CONFIG.peak_lr, betas=CONFIG.betas, eps=CONFIG.eps, weight_decay=0.05)
    for _ in range(3):
        gradient = torch.randn(5, 5)
        norm = float(gradient.norm())
        assert math.isfinite(norm)
        assert norm > 1
        ours.grad, theirs.grad = gradient * 1024, gradient / (norm + 1e-6)
        clipped.gradient_factor = lambda norm=norm: clip_factor(norm, 1.0, 1024.0)
        clipped.step()
        plain.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
