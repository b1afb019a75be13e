"""The stage-2 part of `make fixtures`: a folder with weights, inputs and results of the original code against ours.

Ours runs in float64, so that deviations do not depend on the instructions that a CPU has. Dimensions come from
results.json and the tensors' shapes; a folder with `prefix_ids` is an encoder-decoder.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from isthmus.model.config import LanguageConfig, QFormerConfig
from isthmus.model.formats.key_mapping import reference_name
from isthmus.model.frozen.language import load_language
from isthmus.model.objectives.communicator import LocalCommunicator
from isthmus.model.objectives.stage2 import Stage2Inputs, Stage2Model
from isthmus.model.objectives.step import StepContext
from isthmus.model.qformer.qformer import QFormer
from isthmus.model.text.language_batch import pack_language_tokens

LOSS_TOLERANCE, INTERMEDIATE_TOLERANCE = 1e-5, 2e-5
# Absolute part by kind; the relative part is 1e-4 (the fixtures' READMEs).
GRADIENT_TOLERANCE = {False: 1e-5, True: 3e-4}


class Deviation(NamedTuple):
    case: str
    deviation: float
    allowed: float


def is_stage2(folder: Path) -> bool:
    """Tell whether the folder is a stage-2 fixture."""
    results = folder / "results.json"
    return results.exists() and "text_config" in json.loads(results.read_text())


def check_stage2(folder: Path) -> Iterator[Deviation | str]:
    """Yield the largest deviation of every case; a case whose files are absent as a line that says so."""
    absent = [name for name in ("weights", "inputs", "intermediates") if not (folder / f"{name}.safetensors").exists()]
    if absent:
        yield f"all of stage 2: {', '.join(f'{name}.safetensors' for name in absent)} absent"
        return
    results = json.loads((folder / "results.json").read_text())
    weights, inputs = (load_file(folder / f"{name}.safetensors") for name in ("weights", "inputs"))
    with tempfile.TemporaryDirectory() as place:
        model = load_reference(results, weights, Path(place))
    seq2seq = model.language.is_encoder_decoder
    tokens = reference_tokens(inputs, model.qformer.config.num_queries, seq2seq=seq2seq)
    intermediates = load_file(folder / "intermediates.safetensors")
    features = intermediates["vision_pre_ln"].double()
    rows = torch.arange(features.shape[0])
    batch = Stage2Inputs(tokens, torch.ones_like(rows, dtype=torch.bool), rows, image_BPD=features)
    yield from _compare_intermediates(model, batch, intermediates)
    for size in (len(rows), 1):
        model.zero_grad()
        loss = model.loss_and_backward(
            batch, StepContext(LocalCommunicator(), size, backward=lambda x: x.backward())
        ).total
        yield Deviation(f"loss, micro-batches of {size}", abs(float(loss) - results["loss"]), LOSS_TOLERANCE)
        if not (folder / "grads.safetensors").exists():
            yield "gradients: grads.safetensors absent"
            continue
        yield _compare_gradients(model, folder, size, GRADIENT_TOLERANCE[seq2seq])


def load_reference(results: dict, weights: dict[str, torch.Tensor], place: Path) -> Stage2Model:
    """Build stage 2 from transformers' names; every weight but the vision encoder's must find its place."""
    (place / "config.json").write_text(json.dumps(results["text_config"]))
    prefix = "language_model."
    language = {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}
    save_file(language, place / "model.safetensors")
    sizes = results["qformer_config"]
    config = QFormerConfig(
        hidden_size=sizes["hidden_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"],
        intermediate_size=sizes["intermediate_size"],
        cross_attention_every=sizes["cross_attention_frequency"],
        num_queries=weights["query_tokens"].shape[1],
        dropout=0.0,
        image_norm_eps=1e-6,
    )
    qformer = QFormer(config, weights["vision_model.post_layernorm.weight"].shape[0], with_text=False)
    model = Stage2Model(None, qformer, load_language(LanguageConfig(path=str(place)), place)).double().eval()
    trained = {str(reference_name(name, "hf")): p for name, p in model.trainable_parameters().items()}
    frozen = {name for name in weights if name.startswith((prefix, "vision_model.")) and name not in trained}
    if set(trained) != set(weights) - frozen:
        raise AssertionError(f"names differ: {sorted(set(trained) ^ (set(weights) - frozen))}")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
    return model


def reference_tokens(inputs: dict[str, torch.Tensor], num_queries: int, *, seq2seq: bool) -> dict[str, torch.Tensor]:
    """Return the fixture's text as our three tensors."""
    kind = "prefix" if seq2seq else "text_input"
    labels = inputs["labels"] if seq2seq else inputs["labels"][:, num_queries:]
    mask = inputs["prefix_attention_mask" if seq2seq else "text_attention_mask"]
    return {"input_ids": inputs[f"{kind}_ids"], "attention_mask": mask, "labels": labels}


@torch.no_grad()
def _compare_intermediates(
    model: Stage2Model, batch: Stage2Inputs, expected: dict[str, torch.Tensor]
) -> Iterator[Deviation]:
    features, tokens = expected["vision_pre_ln"].double(), batch.tokens
    queries = model.qformer.encode_images(features)
    found = {
        "image_embeds": model.qformer.ln_vision(features),
        "query_output": queries,
        "projected": model.projection(queries),
    }
    for name, tensor in found.items():
        yield Deviation(name, float((tensor - expected[name]).abs().max()), INTERMEDIATE_TOLERANCE)
    labels = tokens["labels"]
    everyone, seq2seq = torch.ones(len(labels), dtype=torch.bool), model.language.is_encoder_decoder
    (text,) = pack_language_tokens(tokens, everyone, len(labels), is_encoder_decoder=seq2seq)
    # From the reference's projection: each intermediate is compared from the one before it.
    logits_NV = model.language.target_logits(expected["projected"].double(), text)
    rows, columns = (labels != -100).nonzero(as_tuple=True)
    shift = 0 if model.language.is_encoder_decoder else found["projected"].shape[1] - 1
    deviation = (logits_NV - expected["logits"][rows, columns + shift]).abs().max()
    yield Deviation("logits at targets, from the reference's projection", float(deviation), INTERMEDIATE_TOLERANCE)


def _compare_gradients(model: Stage2Model, folder: Path, size: int, absolute: float) -> Deviation:
    expected = load_file(folder / "grads.safetensors")
    excess = []
    for name, parameter in model.trainable_parameters().items():
        wanted = expected.pop(str(reference_name(name, "hf")))
        assert parameter.grad is not None, name
        # In units of what is allowed at each element.
        excess.append(float(((parameter.grad - wanted).abs() / (absolute + 1e-4 * wanted.abs())).max()))
    if expected:
        raise AssertionError(f"gradients of unknown parameters: {sorted(expected)}")
    return Deviation(f"gradients, micro-batches of {size} (1: all that is allowed)", max(excess), 1.0)
