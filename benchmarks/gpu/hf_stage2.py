"""Stage 2 as transformers computes it, for the ratio: whole language model on the card, text padded to 32 tokens.

In its favour: inputs are on the device already, no gradient clipping, no partitioning, optimizer of PyTorch.
"""

import json
from pathlib import Path

import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration

from benchmarks.gpu.measure import Step
from benchmarks.gpu.models import TINY_QFORMER
from isthmus.data_pipeline.reading.batch import Batch

TEXT_TOKENS = 32


def training_step(vision: Path, language: Path, batch: Batch, *, tiny: bool) -> Step:
    """Return a function that trains one step on the batch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _model(vision, language, device, tiny=tiny)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=device.type == "cuda"
    )
    inputs = {name: tensor.to(device) for name, tensor in _inputs(model.config, batch).items()}

    def step(_index: int) -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _model(vision: Path, language: Path, device: torch.device, *, tiny: bool) -> Blip2ForConditionalGeneration:
    vision_config = json.loads((vision / "config.json").read_text())
    text_config = json.loads((language / "config.json").read_text())
    small = {"hidden_size": TINY_QFORMER["hidden_size"], "num_hidden_layers": TINY_QFORMER["num_layers"],
             "num_attention_heads": TINY_QFORMER["num_heads"],
             "intermediate_size": TINY_QFORMER["intermediate_size"]}  # fmt: skip
    config = Blip2Config(
        vision_config=vision_config,
        qformer_config={"encoder_hidden_size": vision_config["hidden_size"], **(small if tiny else {})},
        text_config=text_config,
        num_query_tokens=TINY_QFORMER["num_queries"] if tiny else 32,
        image_token_index=text_config["vocab_size"] - 1,
    )
    with device:
        model = Blip2ForConditionalGeneration(config)
    model.requires_grad_(requires_grad=False)
    model.vision_model.to(torch.bfloat16)
    model.language_model.to(torch.bfloat16)
    for part in (model.qformer, model.language_projection):
        part.requires_grad_(requires_grad=True)
    model.query_tokens.requires_grad_(requires_grad=True)
    model.train()
    model.language_model.eval()
    return model


def _inputs(config: Blip2Config, batch: Batch) -> dict[str, torch.Tensor]:
    rows, side = len(batch.rows_B), config.vision_config.image_size
    queries_BQ = torch.full((rows, config.num_query_tokens), config.image_token_index)

    def padded(name: str, value: int) -> torch.Tensor:
        tokens_BT = batch.tokens[name]
        return torch.nn.functional.pad(tokens_BT, (0, max(0, TEXT_TOKENS - tokens_BT.shape[1])), value=value)

    return {
        "pixel_values": torch.randn(rows, 3, side, side),
        "input_ids": torch.cat([queries_BQ, padded("input_ids", 1)], 1),
        "attention_mask": torch.cat([torch.ones_like(queries_BQ), padded("attention_mask", 0)], 1),
        "labels": torch.cat([torch.full_like(queries_BQ, -100), padded("labels", -100)], 1),
    }
