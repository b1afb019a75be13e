"""The estimate against published counts, the public full-size logs, and its own bookkeeping."""

import json

import pytest

from isthmus.cluster.config import JobConfig
from isthmus.model.config import QFormerConfig
from isthmus.trainer.config.loading import load_config
from isthmus.trainer.errors import ConfigError
from isthmus.trainer.estimate.architectures import BUNDLED, bundled_config
from isthmus.trainer.estimate.flops import Text, self_attention_flops, stage1_work, vision_flops
from isthmus.trainer.estimate.hardware import GIB, Assumptions, Cluster, find_gpu, with_overrides
from isthmus.trainer.estimate.memory import FP32, HALF, trainable_parameters
from isthmus.trainer.estimate.shapes import language_shape, vision_shape
from isthmus.trainer.estimate.step import Parts, divisible, estimate_stage
from tests.original_estimate import (
    original_stage1_activations,
    original_stage1_work,
    original_stage2_activations,
    original_stage2_work,
)

pytestmark = pytest.mark.unit

RECIPES = BUNDLED.parent
Q = QFormerConfig()
LOG_BATCH = 128


def shapes(vision: str, language: str) -> Parts:
    return Parts(vision_shape(bundled_config(vision), 224), language_shape(bundled_config(language)))


VITG_OPT = shapes("eva-clip-vit-g-14", "opt-2.7b")


def test_trainable_parameters_are_those_of_the_public_runs():
    assert trainable_parameters(Q, 1408, stage2=False) == 186_705_470
    assert trainable_parameters(Q, 1408, stage2=True) + 769 * 2560 == 107_133_696


@pytest.mark.parametrize(
    ("name", "billions"),
    [("opt-2.7b", 2.65), ("opt-6.7b", 6.66), ("flan-t5-xl", 2.85), ("flan-t5-xxl", 11.14), ("qwen2.5-7b", 7.62)],
)
def test_language_models_have_their_published_size(name, billions):
    assert language_shape(bundled_config(name)).num_parameters / 1e9 == pytest.approx(billions, rel=0.01)


def test_encoder_work_is_that_measured_for_the_original_encoders():
    assert vision_flops(vision_shape(bundled_config("eva-clip-vit-g-14"), 224)) / 1e9 == pytest.approx(520.7, rel=1e-3)
    clip = vision_shape(bundled_config("clip-vit-large-patch14"), 224)
    assert vision_flops(clip) / 1e9 == pytest.approx(155.3, rel=1e-3)


def test_stage1_work_of_the_original_and_of_this_code():
    vision = VITG_OPT.vision
    assert original_stage1_work(Q, vision).qformer / 1e9 == pytest.approx(240.6, rel=2e-3)
    assert stage1_work(Q, vision, Text()).qformer / 1e9 == pytest.approx(117.1, rel=5e-3)


@pytest.mark.parametrize(("name", "gigaflops"), [("opt-2.7b", 1239), ("opt-6.7b", 2266), ("flan-t5-xl", 1004)])
def test_stage2_work_of_the_original(name, gigaflops):
    parts = shapes("eva-clip-vit-g-14", name)
    work = original_stage2_work(Q, parts.vision, parts.language)
    assert work.total / 1e9 == pytest.approx(gigaflops, rel=2e-3)


def test_peak_memory_of_the_public_runs_is_within_a_fifth():
    """8 x RTX A6000, fp16 autocast, batch 128 per GPU: 37,493 MiB in stage 1, 37,363 MiB in stage 2."""
    vision, language = VITG_OPT.vision, VITG_OPT.language
    fixed = HALF * vision.num_parameters + 1.2e9
    per_parameter = FP32 + FP32 + 2 * FP32 + FP32 + HALF  # weight, gradient, moments, bucket, cast copy
    gathered_features = 2 * 8 * LOG_BATCH * vision.num_tokens * vision.width * FP32
    stage1 = LOG_BATCH * original_stage1_activations(Q, vision) + gathered_features
    stage1 += per_parameter * 186_705_470 + fixed
    assert stage1 / (1 << 20) == pytest.approx(37_493, rel=0.2)
    stage2 = LOG_BATCH * original_stage2_activations(Q, vision, language)
    stage2 += per_parameter * 107_133_696 + fixed + HALF * language.num_parameters
    assert stage2 / (1 << 20) == pytest.approx(37_363, rel=0.2)


@pytest.mark.parametrize(("stage", "first", "second"), [("stage1", 3.56, 3.657), ("stage2", 2.485, 2.507)])
def test_one_public_run_predicts_the_next(stage, first, second):
    """The same cards and batch a week later, with a frozen BERT-base that reads the text besides."""
    reader = 12 * (self_attention_flops(32, 32, 768) + 4 * 32 * 768 * 3072)
    vision, language = VITG_OPT.vision, VITG_OPT.language
    work = original_stage1_work(Q, vision) if stage == "stage1" else original_stage2_work(Q, vision, language)
    assert first * (work.total + reader) / work.total == pytest.approx(second, rel=0.2)


def full_size(name: str, *overrides: str) -> JobConfig:
    return load_config(RECIPES / f"{name}.yaml", overrides, JobConfig)


def test_more_gpus_hold_less_and_step_faster():
    config = full_size("blip2-vitg-opt6.7b")
    parts = shapes("eva-clip-vit-g-14", "opt-6.7b")
    small, large = (
        estimate_stage(config, "stage2", parts, Cluster(find_gpu("a100-80g"), size), Assumptions()) for size in (8, 80)
    )
    assert large.memory.frozen_partition < small.memory.frozen_partition
    assert large.step_seconds < small.step_seconds
    assert large.gpu_hours > small.gpu_hours
    assert small.memory.frozen_partition == pytest.approx(
        HALF * (parts.vision.num_parameters + parts.language.num_parameters / 8)
    )


def test_the_largest_micro_batch_fits_and_one_more_does_not():
    config = full_size("blip2-vitg-opt6.7b", "stage1.global_batch_size=16800", "stage1.micro_batch_size=1")
    parts = shapes("eva-clip-vit-g-14", "opt-6.7b")
    cluster, assumptions = Cluster(find_gpu("a100-40g"), 8), Assumptions()
    largest = estimate_stage(config, "stage1", parts, cluster, assumptions).largest_micro_batch
    room = 40 * GIB * (1 - assumptions.fragmentation)

    def memory_at(micro_batch: int) -> float:
        stage1 = config.stage1.model_copy(update={"micro_batch_size": micro_batch})
        changed = config.model_copy(update={"stage1": stage1})
        return estimate_stage(changed, "stage1", parts, cluster, assumptions).memory.total

    assert memory_at(largest) <= room < memory_at(largest + 1)


def test_too_few_readers_are_the_bottleneck_and_said_so():
    config = full_size("blip2-vitg-opt6.7b", "data.readers=1")
    parts = shapes("eva-clip-vit-g-14", "opt-6.7b")
    starved = estimate_stage(config, "stage1", parts, Cluster(find_gpu("h100"), 16), Assumptions())
    assert starved.bottleneck == "data"
    assert starved.step_seconds == pytest.approx(1680 * Assumptions().reader_cpu_seconds)
    needed = int(starved.recommendation.rpartition(" ")[2])
    fed = full_size("blip2-vitg-opt6.7b", f"data.readers={needed}")
    enough = estimate_stage(fed, "stage1", parts, Cluster(find_gpu("h100"), 16), Assumptions())
    assert enough.step_seconds > enough.seconds["data"]
    assert "readers" not in enough.recommendation


def test_hpz_trades_memory_for_gathers_inside_the_node():
    parts = shapes("eva-clip-vit-g-14", "opt-6.7b")
    flat, within = (
        estimate_stage(
            full_size("blip2-vitg-opt6.7b", f"stage2.deepspeed={template}"),
            "stage2", parts, Cluster(find_gpu("h100"), 16), Assumptions(),
        )
        for template in ("stage2_zero3", "stage2_zero3_hpz")
    )  # fmt: skip
    assert "hpZ" in flat.recommendation
    assert within.step_seconds < flat.step_seconds
    more = within.memory.frozen_partition - flat.memory.frozen_partition
    assert more == pytest.approx(HALF * parts.language.num_parameters / 8)


def test_matching_on_some_rows_is_less_work_memory_and_traffic():
    parts = shapes("eva-clip-vit-g-14", "opt-2.7b")
    every, some = (
        estimate_stage(
            full_size("blip2-vitg-opt2.7b", *overrides),
            "stage1",
            parts,
            Cluster(find_gpu("a100-40g"), 16),
            Assumptions(),
        )
        for overrides in ((), ("stage1.loss.itm_rows=210",))
    )
    assert some.work.qformer < 0.6 * every.work.qformer
    assert some.largest_micro_batch >= every.largest_micro_batch
    assert some.traffic.negatives < 0.5 * every.traffic.negatives
    assert some.days < every.days


def test_sums_in_a_fixed_order_send_less_and_keep_a_sum_for_each_level_of_the_tree():
    parts = shapes("eva-clip-vit-g-14", "opt-2.7b")
    plain, tree = (
        estimate_stage(
            full_size("blip2-vitg-opt2.7b", *overrides), "stage1", parts, Cluster(find_gpu("h100"), 4), Assumptions()
        )
        for overrides in ((), ("run.virtual_ranks=16",))
    )
    assert tree.traffic.gradients == pytest.approx(2 / 3 * plain.traffic.gradients)
    assert tree.memory.activations - plain.memory.activations == pytest.approx(2 * plain.memory.gradients)
    assert tree.micro_batch == plain.micro_batch == 105


def test_recomputing_layers_takes_less_memory():
    parts = shapes("eva-clip-vit-g-14", "opt-6.7b")
    for stage in ("stage1", "stage2"):
        estimate = estimate_stage(
            full_size("blip2-vitg-opt6.7b"), stage, parts, Cluster(find_gpu("h100"), 16), Assumptions()
        )
        assert estimate.memory_checkpointed.activations < 0.6 * estimate.memory.activations


@pytest.mark.parametrize(
    ("gpus", "checkpointing", "said"),
    [
        (8, "false", "micro-batch 64 (at most 67 fit)"),
        (8, "true", "micro-batch 190, all"),
        (1, "true", "does not fit"),
    ],
)
def test_the_recommended_micro_batch_is_the_share_of_a_gpu_or_what_fits(gpus, checkpointing, said):
    config = full_size("blip2-vitg-flant5xxl", f"model.language.activation_checkpointing={checkpointing}")
    parts = shapes("eva-clip-vit-g-14", "flan-t5-xxl")
    estimate = estimate_stage(config, "stage2", parts, Cluster(find_gpu("l4"), gpus), Assumptions())
    assert said in estimate.recommendation


def test_a_sweep_keeps_the_samples_where_a_size_does_not_divide_the_batch():
    config = full_size("blip2-vitg-opt2.7b")
    swept = divisible(config, 32)
    assert swept.stage1.global_batch_size == 1664
    assert swept.stage1.global_batch_size * swept.stage1.steps == pytest.approx(1680 * 250_000, rel=1e-4)
    assert divisible(config, 8) == config
    assert estimate_stage(swept, "stage1", VITG_OPT, Cluster(find_gpu("h100"), 32), Assumptions()).days > 0


def test_every_figure_can_be_overridden_the_cards_too():
    card, assumed = with_overrides(find_gpu("h100"), {"peak_flops": 1e14, "overlap": 0.5})
    assert (card.peak_flops, card.memory_bytes, assumed.overlap) == (1e14, find_gpu("h100").memory_bytes, 0.5)
    config, parts = full_size("blip2-vitg-opt2.7b"), VITG_OPT
    slow, fast = (estimate_stage(config, "stage1", parts, Cluster(gpu, 8), assumed) for gpu in (card, find_gpu("h100")))
    assert slow.seconds["compute"] == pytest.approx(9.89 * fast.seconds["compute"])


def test_what_cannot_be_estimated_is_said():
    config, parts = full_size("blip2-vitg-opt2.7b"), VITG_OPT
    with pytest.raises(ConfigError, match="not divisible by 11 GPUs"):
        estimate_stage(config, "stage1", parts, Cluster(find_gpu("h100"), 11), Assumptions())
    with pytest.raises(ConfigError, match=r"choose one of .*a100-40g"):
        find_gpu("abacus")
    with pytest.raises(ConfigError, match="choose one of"):
        with_overrides(find_gpu("h100"), {"hope": 1.0})
    with pytest.raises(ConfigError, match="patch_size"):
        vision_shape({"model_type": "efficientnet", "hidden_size": 1, "num_hidden_layers": 1}, 224)
    with pytest.raises(ConfigError, match="ffn_dim"):
        language_shape({k: v for k, v in bundled_config("opt-2.7b").items() if k != "ffn_dim"})


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*2*-*.yaml")))
def test_every_full_size_recipe_resolves_and_estimates(recipe):
    config = full_size(recipe)
    parts = shapes(*(path.rpartition("/")[2] for path in (config.model.vision.path, config.model.language.path)))
    for stage in config.stages:
        estimate = estimate_stage(config, stage, parts, Cluster(find_gpu("h100"), 16), Assumptions())
        assert estimate.largest_micro_batch >= config.stage(stage).micro_batch_size
        assert json.loads(json.dumps(estimate.seconds))
        assert 0 < estimate.mfu < 1
