"""The estimate's formulas against the real modules: parameters, operations, and what autograd keeps."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from isthmus.model.config import LanguageConfig, QFormerConfig, Stage1LossConfig
from isthmus.model.frozen.language import load_language
from isthmus.model.objectives.communicator import LocalCommunicator
from isthmus.model.objectives.stage1 import Stage1Model
from isthmus.model.objectives.stage1_batch import Stage1Inputs
from isthmus.model.objectives.stage2 import Stage2Inputs, Stage2Model
from isthmus.model.objectives.step import StepContext
from isthmus.model.qformer.qformer import QFormer
from isthmus.model.tiny import TinyLanguage, write_tiny_language
from isthmus.trainer.estimate.flops import Text, feature_pass_flops, foreign_image_flops, stage1_work, stage2_work
from isthmus.trainer.estimate.memory import Kept, stage1_activations, stage2_activations, trainable_parameters
from isthmus.trainer.estimate.shapes import VisionShape, language_shape
from isthmus.trainer.frozen.zero3 import _save_no_weights
from tests.tensor_memory import TensorMemory

pytestmark = pytest.mark.unit

ROWS, PATCHES, IMAGE_WIDTH = 8, 65, 80
TEXT = Text()
TOKENS = int(TEXT.real)
VISION = VisionShape(2, IMAGE_WIDTH, 320, PATCHES, 8)
Q = QFormerConfig(
    hidden_size=96,
    num_layers=6,
    num_heads=4,
    intermediate_size=384,
    num_queries=16,
    vocab_size=1000,
    max_positions=40,
    dropout=0.0,
    projection_size=16,
)
LANGUAGES: tuple[TinyLanguage, ...] = ("opt", "llama", "t5")


def stage1(rows: int = ROWS, itm_rows: int | None = None) -> tuple[Stage1Model, Stage1Inputs]:
    torch.manual_seed(0)
    ids = torch.randint(5, 900, (rows, TOKENS))
    inputs = Stage1Inputs(
        input_ids_BT=ids,
        attention_mask_BT=torch.ones_like(ids),
        valid_B=torch.ones(rows, dtype=torch.bool),
        rows_B=torch.arange(rows),
        image_BPD=torch.randn(rows, PATCHES, IMAGE_WIDTH),
    )
    return Stage1Model(None, QFormer(Q, IMAGE_WIDTH), Stage1LossConfig(itm_rows=itm_rows)), inputs


def stage2(kind: TinyLanguage, folder: Path) -> tuple[Stage2Model, Stage2Inputs]:
    torch.manual_seed(0)
    language = load_language(LanguageConfig(path=str(folder)), write_tiny_language(folder, kind, num_layers=4))
    for module in language.modules():
        if isinstance(module, nn.Linear):
            _save_no_weights(module)  # as under ZeRO-3
    ids = torch.randint(5, 90, (ROWS, TOKENS))
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    if kind == "t5":
        prefix = ids[:, : int(TEXT.prefix)]
        tokens = {"input_ids": prefix, "attention_mask": torch.ones_like(prefix), "labels": ids[:, : int(TEXT.suffix)]}
    inputs = Stage2Inputs(
        tokens=tokens,
        valid_B=torch.ones(ROWS, dtype=torch.bool),
        rows_B=torch.arange(ROWS),
        image_BPD=torch.randn(ROWS, PATCHES, IMAGE_WIDTH),
    )
    return Stage2Model(None, QFormer(Q, IMAGE_WIDTH, with_text=False), language), inputs


def step(
    model: Stage1Model | Stage2Model, inputs: Stage1Inputs | Stage2Inputs, micro: int = ROWS
) -> Callable[[], None]:
    def run() -> None:
        model.loss_and_backward(inputs, StepContext(LocalCommunicator(), micro, backward=torch.Tensor.backward))

    return run


def counted_flops(run: Callable[[], None]) -> float:
    """Operations per row; attention as plain products, which the counter sees on every device."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / ROWS


def kept_bytes(run: Callable[[], None]) -> float:
    """Bytes that autograd keeps for backward, each storage once, parameters left out."""
    storages: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        of_parameter = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
        if not of_parameter:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())  # no other tensor may take its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storages.values())


def test_stage1_parameters_are_exact():
    model, _ = stage1()
    counted = sum(parameter.numel() for parameter in model.trainable_parameters().values())
    assert trainable_parameters(Q, IMAGE_WIDTH, stage2=False) == counted


@pytest.mark.parametrize("micro", [ROWS, ROWS // 2])
def test_stage1_work_is_within_2_percent(micro):
    model, inputs = stage1()
    expected = stage1_work(Q, VISION, TEXT).qformer
    if micro < ROWS:
        expected += feature_pass_flops(Q, VISION, TEXT)
        expected += foreign_image_flops(Q, VISION) * foreign_images(model, inputs, micro) / ROWS
    assert counted_flops(step(model, inputs, micro)) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("micro", [ROWS, ROWS // 2])
def test_stage1_work_of_a_row_that_is_matched_is_within_2_percent(micro):
    one, five = (stage1_work(Q, VISION, TEXT, matched=rows / ROWS).qformer for rows in (1, 5))
    counted_one, counted_five = (counted_flops(step(*stage1(itm_rows=rows), micro)) for rows in (1, 5))
    assert counted_five - counted_one == pytest.approx(five - one, rel=0.02)
    assert counted_one == pytest.approx(one + (micro < ROWS) * feature_pass_flops(Q, VISION, TEXT), rel=0.03)


def foreign_images(model: Stage1Model, inputs: Stage1Inputs, micro: int) -> int:
    """Images that the micro-batches encode beyond their own."""
    encoded = []
    original = model.qformer.image_kv

    def counting(image_IPC: torch.Tensor):
        encoded.append(len(image_IPC))
        return original(image_IPC)

    model.qformer.image_kv = counting
    step(model, inputs, micro)()
    model.qformer.image_kv = original
    return sum(encoded) - 2 * ROWS


@pytest.mark.parametrize("drawn", [None, 0.75])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_peak_of_stage1_activations_is_within_15_percent(precision, drawn):
    """Twice the rows against once: what does not grow with the rows, such as casts of weights, cancels."""
    expected = ROWS * stage1_activations(Q, VISION, TEXT, Kept.of(precision, Q.dropout), drawn=drawn).peak
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        once, twice = (
            peak_bytes(step(*stage1(rows, int(rows * drawn) if drawn else None), micro=2 * ROWS))
            for rows in (ROWS, 2 * ROWS)
        )
    assert twice - once == pytest.approx(expected, rel=0.15)


def peak_bytes(run: Callable[[], None]) -> int:
    """Bytes of tensors that a second run adds at its fullest; the first leaves the gradients."""
    run()
    with TensorMemory() as memory:
        run()
    return memory.peak


@pytest.mark.parametrize("kind", LANGUAGES)
def test_stage2_parameters_work_and_activations(kind, tmp_path):
    model, inputs = stage2(kind, tmp_path)
    shape = language_shape(json.loads((tmp_path / "config.json").read_text()))
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.language.parameters())
    trainable = trainable_parameters(Q, IMAGE_WIDTH, stage2=True) + (Q.hidden_size + 1) * shape.width
    assert trainable == sum(parameter.numel() for parameter in model.trainable_parameters().values())
    work = stage2_work(Q, VISION, shape, TEXT)
    assert counted_flops(step(model, inputs)) == pytest.approx(work.qformer + work.language, rel=0.02)
    expected = stage2_activations(Q, VISION, shape, TEXT, Kept.of("fp32", Q.dropout), language_element=4)
    assert kept_bytes(step(model, inputs)) / ROWS == pytest.approx(expected, rel=0.15)
