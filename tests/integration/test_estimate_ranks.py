"""The estimate against two gloo ranks: bytes of the frozen partition, and bytes that a rank receives per step."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from data_pipeline.object_store import ObjectStore
from model.config import LanguageConfig, QFormerConfig
from model.exchange import ProcessGroupExchange
from model.qformer import QFormer
from model.stage1 import Stage1Inputs, Stage1Model
from model.stage2 import Stage2Inputs, Stage2Model
from model.tiny import write_tiny_language
from tests.engine_toys import make_engine
from tests.ranks import run_ranks
from trainer.context import LocalContext
from trainer.estimate.memory import FP32, trainable_parameters
from trainer.estimate.shapes import VisionShape, language_shape
from trainer.estimate.traffic import stage_traffic
from trainer.frozen_weights import frozen_language

pytestmark = pytest.mark.integration

WORLD, ROWS, MICRO, TOKENS, PATCHES, IMAGE_WIDTH = 2, 8, 4, 12, 65, 80
VISION = VisionShape(2, IMAGE_WIDTH, 320, PATCHES, 8)
Q = QFormerConfig(
    hidden_size=48,
    num_layers=2,
    num_heads=4,
    intermediate_size=96,
    num_queries=8,
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
        zero |= {"stage3_max_reuse_distance": distance, "reduce_bucket_size": 5_000_000}
        zero |= {"stage3_prefetch_bucket_size": distance // 20}
        (root / f"{name}.json").write_text(json.dumps({"zero_optimization": zero}))
    ranks = run_ranks(on_rank, WORLD, str(root), timeout_seconds=240)
    return {"root": root, "ranks": ranks}


def on_rank(rank: int, _world_size: int, root: str) -> dict[str, Any]:
    from trainer.process_group import join_process_group

    join_process_group(LocalContext().rank, 60)
    template = f"{root}/far.json"
    results: dict[str, Any] = {"stage1": steps(Stage1Model(None, QFormer(Q, IMAGE_WIDTH)), template, rank)}
    for kind, reuse in (("opt", "near"), ("opt", "far"), ("t5", "near")):
        template = f"{root}/{reuse}.json"
        folder = f"{root}/{kind}"
        language = frozen_language(LanguageConfig(path=folder), folder, ObjectStore(), LocalContext().rank, template)
        partition = sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in language.parameters())
        model = Stage2Model(None, QFormer(Q, IMAGE_WIDTH, with_text=False), language)
        results[f"{kind} {reuse}"] = steps(model, template, rank) | {"partition": partition}
        language.partitioning.destroy()
    return results


def steps(model: Any, template: str, rank: int) -> dict[str, Any]:
    """Train two steps to settle, then count one."""
    engine, exchange = make_engine(template, model), ProcessGroupExchange()
    for step in range(3):
        if step == 2:
            received, undo = count_received()
        model.loss_and_backward(
            inputs_of(model, rank), seed=0, step=step, micro_batch_size=MICRO, exchange=exchange,
            backward=engine.backward,
        )  # fmt: skip
        engine.step(1e-4)
    undo()
    engine._wrapped.destroy()
    return {"received": dict(received)}


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
    return stage_traffic(
        Q, VISION, language, trainable=trainable, world_size=WORLD, local=ROWS, micro=MICRO, vision_element=FP32,
        language_element=FP32, reuse_distance=REUSE[reuse],
    )  # fmt: skip


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
