"""Stage 2, forward and backward: ours against transformers' Blip2ForConditionalGeneration with the same weights.

Both sides freeze the vision encoder and the language model and train ln_vision, Q-Former and projection; features of
the encoder are given (257 x 1408), so the frozen ViT counts on neither side. CPU seconds of this process, sides
alternating; text is padded to 32 tokens with real lengths 8-16.

    OMP_NUM_THREADS=1 python benchmarks/stage2_speed.py [--repeats 3]
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from isthmus.model.config import LanguageConfig, QFormerConfig
from isthmus.model.formats.key_mapping import reference_name
from isthmus.model.frozen.language import load_language
from isthmus.model.objectives.communicator import LocalCommunicator
from isthmus.model.objectives.stage2 import Stage2Inputs, Stage2Model
from isthmus.model.objectives.step import StepContext
from isthmus.model.qformer.qformer import QFormer

BATCH, TEXT_TOKENS, PATCHES, IMAGE_WIDTH = 8, 32, 257, 1408
LENGTHS = (8, 9, 10, 11, 12, 13, 15, 16)
PREFIX = 4
QFORMER = QFormerConfig(dropout=0.0, image_norm_eps=1e-6)


def language_folder(kind: str, folder: Path) -> Path:
    """Write a random model with the dimensions of OPT-125M, or a T5 v1.1 base of 12 + 12 layers."""
    torch.manual_seed(0)
    if kind == "opt":
        model = OPTForCausalLM(OPTConfig())
    else:
        config = T5Config(d_model=768, d_kv=64, d_ff=2048, num_layers=12, num_heads=12, feed_forward_proj="gated-gelu")
        config.decoder_start_token_id = 0
        model = T5ForConditionalGeneration(config)
    model.save_pretrained(folder)
    return folder


def rows(kind: str) -> dict[str, torch.Tensor]:
    """Return tokens padded to 32 with real lengths 8-16; for T5 four prefix tokens and the rest as target."""
    torch.manual_seed(1)
    ids = torch.randint(5, 30000, (BATCH, TEXT_TOKENS))
    real = torch.arange(TEXT_TOKENS) < torch.tensor(LENGTHS)[:, None]
    if kind == "opt":
        return {
            "input_ids": ids.masked_fill(~real, 1),
            "attention_mask": real.long(),
            "labels": ids.masked_fill(~real, -100),
        }
    prefix = (torch.arange(TEXT_TOKENS) < PREFIX).expand(BATCH, -1)
    rest = ids.roll(-PREFIX, dims=1).masked_fill(
        torch.arange(TEXT_TOKENS) >= torch.tensor(LENGTHS)[:, None] - PREFIX, -100
    )
    return {"input_ids": ids.masked_fill(~prefix, 0), "attention_mask": prefix.long(), "labels": rest}


def ours(folder: Path) -> Stage2Model:
    """Build our stage 2 around the language model."""
    torch.manual_seed(2)
    language = load_language(LanguageConfig(path=str(folder)), folder)
    return Stage2Model(None, QFormer(QFORMER, IMAGE_WIDTH, with_text=False), language).eval()


def theirs(model: Stage2Model) -> Blip2ForConditionalGeneration:
    """Build transformers' model with the same weights and a vision encoder of one layer, which is bypassed."""
    text = model.language.model.config
    config = Blip2Config(
        vision_config={"num_hidden_layers": 1, "hidden_size": IMAGE_WIDTH},
        qformer_config={"vocab_size": QFORMER.vocab_size},
        text_config=text.to_dict(),
        image_token_index=text.vocab_size - 1,
    )
    hf = Blip2ForConditionalGeneration(config)
    hf.language_model = model.language.model
    named = dict(hf.named_parameters())
    hf.requires_grad_(requires_grad=False)
    with torch.no_grad():
        for name, parameter in model.trainable_parameters().items():
            target = named[str(reference_name(name, "hf"))]
            target.copy_(parameter)
            target.requires_grad_(requires_grad=True)
    norm = hf.vision_model.post_layernorm
    hf.vision_model.forward = lambda pixel_values, **_: _VisionOutput(norm(pixel_values))
    return hf.eval()


class _VisionOutput(SimpleNamespace):
    """What Blip2 reads of its encoder: features after the LayerNorm."""

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__(last_hidden_state=features, pooler_output=features[:, 0], hidden_states=None, attentions=None)

    def __getitem__(self, index: int) -> torch.Tensor:
        return (self.last_hidden_state,)[index]


def our_step(model: Stage2Model, features: torch.Tensor, tokens: dict[str, torch.Tensor]) -> float:
    """Run forward and backward; return the loss."""
    inputs = Stage2Inputs(tokens, torch.ones(BATCH, dtype=torch.bool), torch.arange(BATCH), image_BPD=features)
    output = model.loss_and_backward(
        inputs, StepContext(LocalCommunicator(), BATCH, backward=lambda loss: loss.backward())
    )
    return float(output.total)


def their_step(hf: Blip2ForConditionalGeneration, features: torch.Tensor, tokens: dict[str, torch.Tensor]) -> float:
    """Run forward and backward with placeholders before the text, as transformers wants them."""
    queries = torch.full((BATCH, QFORMER.num_queries), hf.config.image_token_index)
    labels = tokens["labels"]
    if hf.config.use_decoder_only_language_model:
        labels = torch.cat([torch.full_like(queries, -100), labels], dim=1)
    output = hf(
        pixel_values=features,
        input_ids=torch.cat([queries, tokens["input_ids"]], dim=1),
        attention_mask=torch.cat([torch.ones_like(queries), tokens["attention_mask"]], dim=1),
        labels=labels,
    )
    output.loss.backward()
    return float(output.loss)


def measure(kind: str, repeats: int) -> dict[str, object]:
    """Return losses, CPU seconds and FLOPs of both sides."""
    with tempfile.TemporaryDirectory() as place:
        model = ours(language_folder(kind, Path(place) / kind))
    hf, tokens = theirs(model), rows(kind)
    features = torch.randn(BATCH, PATCHES, IMAGE_WIDTH)
    named = dict(hf.named_parameters())
    sides = {
        "ours": lambda: our_step(model, features, tokens),
        "transformers": lambda: their_step(hf, features, tokens),
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    losses = {side: step() for side, step in sides.items()}
    gradient = max(
        float((p.grad - named[str(reference_name(n, "hf"))].grad).abs().max() / p.grad.abs().max().clamp_min(1e-12))
        for n, p in model.trainable_parameters().items()
        if p.grad is not None and not n.endswith("key.bias")  # zero by construction
    )
    for _ in range(repeats):
        for side, step in sides.items():
            began = time.process_time()
            step()
            seconds[side].append(time.process_time() - began)
    flops = {}
    for side, step in sides.items():
        with FlopCounterMode(display=False) as counter:
            step()
        flops[side] = counter.get_total_flops() / 1e9
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    return {
        "language_model": kind,
        "losses": losses,
        "largest_relative_gradient_difference": gradient,
        "cpu_seconds": {side: round(value, 2) for side, value in medians.items()},
        "cpu_seconds_ratio": round(medians["transformers"] / medians["ours"], 2),
        "gigaflops": {side: round(value, 1) for side, value in flops.items()},
        "gigaflops_per_second": {side: round(flops[side] / medians[side], 1) for side in medians},
    }


def main() -> None:
    """Measure both kinds of language model and print one JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for kind in ("opt", "t5"):
        print(json.dumps(measure(kind, arguments.repeats)), flush=True)


if __name__ == "__main__":
    main()
