"""Predicted against measured: CPU step time of both stages from this machine's measured rate; and the public runs.

    OMP_NUM_THREADS=1 python -m benchmarks.estimate_truth [--quick]

The rate of one core comes from the products that make up a step, not from the step itself: the two largest shapes of
the Q-Former, timed alone. A step's prediction is its counted operations over that rate plus its memory traffic over the
measured bandwidth. The public runs (8 x RTX A6000, and the paper's 16 x A100-40G) are only computed.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isthmus.model.config import LanguageConfig, QFormerConfig
from isthmus.model.frozen.language import load_language
from isthmus.model.objectives.communicator import LocalCommunicator
from isthmus.model.objectives.stage1 import Stage1Model
from isthmus.model.objectives.stage1_batch import Stage1Inputs
from isthmus.model.objectives.stage2 import Stage2Inputs, Stage2Model
from isthmus.model.objectives.step import StepContext
from isthmus.model.qformer.qformer import QFormer
from isthmus.model.tiny import write_tiny_language
from isthmus.trainer.estimate.architectures import bundled_config
from isthmus.trainer.estimate.flops import Text, self_attention_flops, stage1_work, stage2_work
from isthmus.trainer.estimate.hardware import find_gpu
from isthmus.trainer.estimate.memory import FP32, Kept, stage1_activations, stage2_activations
from isthmus.trainer.estimate.shapes import VisionShape, language_shape, vision_shape
from tests.original_estimate import PADDED_TOKENS, original_stage1_work, original_stage2_work

ROWS, TOKENS = 8, 12
A6000_SECONDS = {"stage1": 3.56, "stage2": 2.485}
SECOND_RUN_SECONDS = {"stage1": 3.657, "stage2": 2.507}
"""The same cards, batch and models a week later, with a frozen BERT that reads the text as well (BLIP-T)."""
PAPER_DAYS = {"stage1": 6, "stage2": 3}
PAPER_STEPS = {"stage1": (250_000, 1680), "stage2": (80_000, 1520)}
ELEMENTWISE_PASSES = 3


def seconds_of(action: Callable[[], object], repeats: int) -> float:
    """Return the least CPU seconds of some repeats, after one to warm up."""
    action()
    found = []
    for _ in range(repeats):
        began = time.process_time()
        action()
        found.append(time.process_time() - began)
    return min(found)


def rates(q: QFormerConfig, vision: VisionShape, repeats: int) -> tuple[float, float]:
    """Return operations per second of the step's largest products, and bytes per second of elementwise work."""
    shapes = [
        (ROWS * vision.num_tokens, vision.width, q.hidden_size),
        (ROWS * 3 * q.num_queries, q.hidden_size, q.intermediate_size),
        (ROWS * 3 * q.num_queries, q.intermediate_size, q.hidden_size),
        (ROWS * 3 * (q.num_queries + TOKENS), q.hidden_size, q.hidden_size),
    ]
    found = []
    for rows, inner, columns in shapes:
        a, b = torch.randn(rows, inner), torch.randn(columns, inner)

        def product(a: Tensor = a, b: Tensor = b) -> Tensor:
            return a @ b.T

        found.append(2 * rows * inner * columns / seconds_of(product, repeats))
    x = torch.randn(4_000_000)
    return statistics.harmonic_mean(found), 2 * x.nbytes / seconds_of(lambda: x * 2.0, repeats)


def steps(quick: bool) -> list[dict[str, Any]]:
    """Return predicted and measured CPU seconds of a step of each stage."""
    torch.manual_seed(0)
    width, layers = (384, 2) if quick else (768, 4)
    q = QFormerConfig(
        hidden_size=width, num_layers=layers, num_heads=12, intermediate_size=4 * width, num_queries=32,
        vocab_size=2000, max_positions=40, dropout=0.0, projection_size=64,
    )  # fmt: skip
    vision = VisionShape(1, 512, 2048, 65 if quick else 257, 14)
    repeats = 2 if quick else 5
    features = torch.randn(ROWS, vision.num_tokens, vision.width)
    ids = torch.randint(5, 90, (ROWS, TOKENS))
    common: dict[str, Any] = {
        "valid_B": torch.ones(ROWS, dtype=torch.bool), "rows_B": torch.arange(ROWS), "image_BPD": features,
    }  # fmt: skip
    kept, text = Kept.of("fp32", 0.0), Text(real=TOKENS)
    flops_rate, bytes_rate = rates(q, vision, repeats + 2)
    found = []

    def compare(what: str, model: Any, inputs: Any, work: float, activations: float) -> None:
        def step() -> None:
            model.zero_grad(set_to_none=True)
            model.loss_and_backward(inputs, StepContext(LocalCommunicator(), ROWS, backward=Tensor.backward))

        trainable = sum(p.numel() for p in model.trainable_parameters().values())
        moved = ELEMENTWISE_PASSES * ROWS * activations + FP32 * trainable
        predicted = ROWS * work / flops_rate + moved / bytes_rate
        measured = seconds_of(step, repeats)
        found.append({
            "what": what, "predicted s": predicted, "measured s": measured,
            "predicted / measured": predicted / measured, "GF/s": flops_rate / 1e9, "GB/s": bytes_rate / 1e9,
        })  # fmt: skip

    first = Stage1Model(None, QFormer(q, vision.width))
    inputs = Stage1Inputs(input_ids_BT=ids, attention_mask_BT=torch.ones_like(ids), **common)
    work = stage1_work(q, vision, text).qformer
    compare("stage 1", first, inputs, work, stage1_activations(q, vision, text, kept).written)
    with tempfile.TemporaryDirectory() as name:
        folder = write_tiny_language(Path(name) / "opt", "opt", width=512, num_layers=6, vocab_size=2000)
        language = load_language(LanguageConfig(path=str(folder)), folder)
        shape = language_shape(json.loads((folder / "config.json").read_text()))
    second = Stage2Model(None, QFormer(q, vision.width, with_text=False), language)
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    both = stage2_work(q, vision, shape, text)
    activations = stage2_activations(q, vision, shape, text, kept, language_element=FP32)
    compare("stage 2", second, Stage2Inputs(tokens=tokens, **common), both.qformer + both.language, activations)
    return found


def work_of(stage: str, language: str, *, original: bool) -> float:
    """Return operations per sample of a full-size stage with ViT-g."""
    q, vision = QFormerConfig(), vision_shape(bundled_config("eva-clip-vit-g-14") or {}, 224)
    if stage == "stage1":
        return (original_stage1_work(q, vision) if original else stage1_work(q, vision, Text())).total
    shape = language_shape(bundled_config(language) or {})
    if original:
        return original_stage2_work(q, vision, shape).total
    return stage2_work(q, vision, shape, Text(longest=24.0)).total


def public_logs() -> dict[str, Any]:
    """Return, for 8 x RTX A6000 at 128 a card with OPT-2.7B, the efficiency that one run implies, and what follows.

    It is fitted to the first run and predicts the second one, and ours.
    """
    q, padded = QFormerConfig(), PADDED_TOKENS
    reader = q.num_layers * (
        self_attention_flops(padded, padded, q.hidden_size) + 4 * padded * q.hidden_size * q.intermediate_size
    )
    peak = find_gpu("rtx-a6000").peak_flops
    logs = {}
    for stage, seconds in A6000_SECONDS.items():
        original, ours = (work_of(stage, "opt-2.7b", original=flag) for flag in (True, False))
        logs[stage] = {
            "original GF per sample": original / 1e9, "logged s": seconds,
            "fitted fraction of peak": 128 * original / seconds / peak,
            "second run, predicted s": seconds * (original + reader) / original,
            "second run, logged s": SECOND_RUN_SECONDS[stage],
            "ours GF per sample": ours / 1e9, "ours s at the same fraction": seconds * ours / original,
        }  # fmt: skip
    return logs


def paper() -> dict[str, Any]:
    """Return the fraction of 16 x A100's peak that the paper's days imply at least (FlanT5-XXL)."""
    peak = 16 * find_gpu("a100-40g").peak_flops
    implied = {}
    for stage, (num_steps, batch) in PAPER_STEPS.items():
        work = num_steps * batch * work_of(stage, "flan-t5-xxl", original=True)
        ours = num_steps * batch * work_of(stage, "flan-t5-xxl", original=False)
        fraction = work / (PAPER_DAYS[stage] * 86400 * peak)
        implied[stage] = {
            "least fraction of peak": fraction,
            "ours, days at that fraction": ours / peak / fraction / 86400,
        }
    return implied


def main() -> None:
    """Print everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps({"steps": steps(options.quick), "public logs": public_logs(), "paper": paper()}, indent=1))


if __name__ == "__main__":
    main()
