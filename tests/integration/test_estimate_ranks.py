"""The estimate against two gloo ranks: bytes of the frozen partition, received per step, and at the peak of a step."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from isthmus.cluster.config import JobConfig
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.model.config import LanguageConfig, QFormerConfig
from isthmus.model.objectives.communicator import ProcessGroupCommunicator
from isthmus.model.objectives.stage1 import Stage1Model
from isthmus.model.objectives.stage1_batch import Stage1Inputs
from isthmus.model.objectives.stage2 import Stage2Inputs, Stage2Model
from isthmus.model.objectives.step import StepContext
from isthmus.model.qformer.qformer import QFormer
from isthmus.model.tiny import write_tiny_language
from isthmus.trainer.context import LocalContext
from isthmus.trainer.estimate.hardware import Assumptions, Cluster, find_gpu
from isthmus.trainer.estimate.memory import FP32, trainable_parameters
from isthmus.trainer.estimate.shapes import VisionShape, language_shape
from isthmus.trainer.estimate.step import Parts, estimate_stage
from isthmus.trainer.estimate.traffic import RankStep, stage_traffic
from isthmus.trainer.frozen.zero3 import load_frozen_lm
from tests.engine_toys import make_engine
from tests.ranks import run_ranks
from tests.tensor_memory import TensorMemory

pytestmark = pytest.mark.integration

WORLD, ROWS, MICRO, TOKENS, PATCHES, IMAGE_WIDTH = 2, 16, 8, 12, 65, 80
VISION = VisionShape(2, IMAGE_WIDTH, 320, PATCHES, 8)
Q = QFormerConfig(
    hidden_size=96,
    num_layers=4,
    num_heads=4,
    intermediate_size=384,
    num_queries=16,
    vocab_size=500,
    max_positions=40,
    dropout=0.0,
    projection_size=16,
)
REUSE = {"near": 0, "far": 1_000_000_000}


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the ranks counted, by case; one start of two processes for all cases."""
    root = tmp_path_factory.mktemp("estimate")
    for kind in ("opt", "t5"):
        write_tiny_language(root / kind, kind, num_layers=3)
    for name, distance in REUSE.items():
        zero = {"stage": 1, "overlap_comm": False, "stage3_param_persistence_threshold": 0}
        zero |= {"stage3_max_reuse_distance": distance, "reduce_bucket_size": 200_000}
        zero |= {"stage3_prefetch_bucket_size": distance // 20}
        (root / f"{name}.json").write_text(json.dumps({"zero_optimization": zero}))
    ranks = run_ranks(on_rank, WORLD, str(root), timeout_seconds=240)
    return {"root": root, "ranks": ranks}


def on_rank(rank: int, _world_size: int, root: str) -> dict[str, Any]:
    results = {"stage1": measure(lambda: Stage1Model(None, QFormer(Q, IMAGE_WIDTH)), f"{root}/far.json", rank)}
    for kind, reuse in (("opt", "near"), ("opt", "far"), ("t5", "near")):
        template, folder = f"{root}/{reuse}.json", f"{root}/{kind}"

        def stage2(template: str = template, folder: str = folder) -> Stage2Model:
            config, rank_of = LanguageConfig(path=folder), LocalContext().rank
            language = load_frozen_lm(config, folder, ObjectStore(), rank_of, template)
            return Stage2Model(None, QFormer(Q, IMAGE_WIDTH, with_text=False), language)

        results[f"{kind} {reuse}"] = measure(stage2, template, rank)
    return results


def measure(make: Callable[[], Any], template: str, rank: int) -> dict[str, Any]:
    """Train two steps to settle, then count one: bytes received, and of all tensors at its peak."""
    with TensorMemory() as memory:
        model = make()
        engine, communicator = make_engine(template, model), ProcessGroupCommunicator()
        for step in range(3):
            if step == 2:
                received, undo = count_received()
                memory.peak = memory.live
            context = StepContext(communicator, MICRO, step=step, backward=engine.backward)
            model.loss_and_backward(inputs_of(model, rank), context)
            engine.step(1e-4)
    undo()
    engine._wrapped.destroy()
    result = {"received": dict(received), "peak": memory.peak}
    if isinstance(model, Stage2Model):
        result["partition"] = sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in model.language.parameters())
        model.language.partitioning.destroy()
    return result


def inputs_of(model: Any, rank: int) -> Any:
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(5, 90, (ROWS, TOKENS), generator=generator)
    common: dict[str, Any] = {
        "valid_B": torch.ones(ROWS, dtype=torch.bool),
        "rows_B": torch.arange(ROWS) + rank * ROWS,
        "image_BPD": torch.randn(ROWS, PATCHES, IMAGE_WIDTH, generator=generator),
    }
    if isinstance(model, Stage1Model):
        return Stage1Inputs(input_ids_BT=ids, attention_mask_BT=torch.ones_like(ids), **common)
    return Stage2Inputs(tokens={"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}, **common)


def count_received() -> tuple[dict[str, float], Any]:
    """Count the bytes that reach this rank in every collective from here on; the second value stops it."""
    from deepspeed.comm import comm

    received: dict[str, float] = {}
    share = (WORLD - 1) / WORLD

    def bytes_of(name: str, first: Any) -> float:
        size = sum(t.nbytes for t in first) if isinstance(first, list) else first.nbytes
        return {"all_reduce": 2 * share * size, "all_to_all_single": float(size)}.get(name, share * size)

    real = {name: getattr(dist, name) for name in ("all_reduce", "all_gather", "all_gather_into_tensor",
            "all_to_all_single", "reduce", "broadcast")}  # fmt: skip
    gather = comm.cdb.all_gather_function
    depth = [0]

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not depth[0]:
                received[name] = received.get(name, 0.0) + bytes_of(name, [*args, *kwargs.values()][0])
            depth[0] += 1
            try:
                return real[name](*args, **kwargs)
            finally:
                depth[0] -= 1

        return call

    for name in real:
        setattr(dist, name, counting(name))
    comm.cdb.all_gather_function = dist.all_gather_into_tensor

    def undo() -> None:
        for name, function in real.items():
            setattr(dist, name, function)
        comm.cdb.all_gather_function = gather

    return received, undo


def predicted(language: Any, reuse: str) -> Any:
    trainable = trainable_parameters(Q, IMAGE_WIDTH, stage2=language is not None)
    if language is not None:
        trainable += (Q.hidden_size + 1) * language.width
    return stage_traffic(Q, VISION, language, RankStep(trainable, WORLD, ROWS, MICRO, FP32, FP32, REUSE[reuse]))


def shape_of(counted: dict[str, Any], kind: str) -> Any:
    folder: Path = counted["root"] / kind
    return language_shape(json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_the_frozen_partition_is_exact(counted, kind):
    whole = FP32 * shape_of(counted, kind).num_parameters
    assert [result[f"{kind} near"]["partition"] for result in counted["ranks"]] == [whole / WORLD] * WORLD


def test_bytes_received_in_stage1_are_within_5_percent(counted):
    mean = sum(sum(result["stage1"]["received"].values()) for result in counted["ranks"]) / WORLD
    assert mean == pytest.approx(predicted(None, "far").total, rel=0.05)


@pytest.mark.parametrize(("kind", "reuse"), [("opt", "near"), ("opt", "far"), ("t5", "near")])
def test_bytes_received_in_stage2_are_within_5_percent(counted, kind, reuse):
    for result in counted["ranks"]:
        received = sum(result[f"{kind} {reuse}"]["received"].values())
        assert received == pytest.approx(predicted(shape_of(counted, kind), reuse).total, rel=0.05)


def predicted_peak(counted: dict[str, Any], language: Any, reuse: str) -> float:
    """What is in a process of the estimate's total: neither an encoder nor a CUDA context."""
    stage = {
        "steps": 1, "global_batch_size": WORLD * ROWS, "micro_batch_size": MICRO, "precision": "fp32",
        "deepspeed": str(counted["root"] / f"{reuse}.json"),
    }  # fmt: skip
    model = {"vision": {"path": "unused", "dtype": "float32"}, "qformer": Q.model_dump()}
    stages = {"stage1": stage}
    if language is not None:
        model["language"] = {"path": "unused", "dtype": "float32"}
        stages["stage2"] = stage
    config = JobConfig.model_validate(
        {"run": {"name": "peak", "url": "unused"}, "data": {"sources": [{"manifest": "unused"}], "lanes": WORLD},
         "model": model, **stages}
    )  # fmt: skip
    assumed = Assumptions(real_text_tokens=TOKENS, longest_text_tokens=TOKENS)
    cluster = Cluster(find_gpu("h100"), WORLD)
    memory = estimate_stage(config, list(stages)[-1], Parts(VISION, language), cluster, assumed).memory
    return memory.total - memory.context - FP32 * VISION.num_parameters


def test_the_peak_of_stage1_is_within_15_percent(counted):
    for result in counted["ranks"]:
        assert result["stage1"]["peak"] == pytest.approx(predicted_peak(counted, None, "far"), rel=0.15)


@pytest.mark.parametrize(("kind", "reuse"), [("opt", "near"), ("opt", "far"), ("t5", "near")])
def test_the_peak_of_stage2_is_within_15_percent(counted, kind, reuse):
    expected = predicted_peak(counted, shape_of(counted, kind), reuse)
    for result in counted["ranks"]:
        assert result[f"{kind} {reuse}"]["peak"] == pytest.approx(expected, rel=0.15)
