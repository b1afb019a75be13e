"""The stage-1 part of `make fixtures`: a folder with weights, inputs and results of the original code against ours.

Ours runs in float64, so that deviations do not depend on the instructions that a CPU has: what is left is the rounding
of the reference, which ran in float32. Dimensions come from config.json and the tensors' shapes. The allowed deviation
of gradients is 1e-4 + 1e-4 of the reference's value (the fixture's README); the deviation shown is what is left after
the relative part.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from isthmus.model.config import QFormerConfig, Stage1LossConfig
from isthmus.model.formats.key_mapping import reference_name
from isthmus.model.formats.native import load_trained
from isthmus.model.objectives.communicator import Communicator, LocalCommunicator, ProcessGroupCommunicator
from isthmus.model.objectives.stage1 import Stage1Model, matching_mask, unimodal_mask
from isthmus.model.objectives.stage1_batch import Stage1Inputs
from isthmus.model.objectives.step import StepContext
from isthmus.model.qformer.layers import Rows
from isthmus.model.qformer.packing import pack_captions
from isthmus.model.qformer.qformer import QFormer
from tests.ranks import run_ranks
from tests.reference import stage1 as plain

LOSS_TOLERANCE, INTERMEDIATE_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 2e-5, 1e-4
# A parameter after six steps of AdamW with learning rate 1e-3: rounding is amplified where the gradient is nearly zero.
PARAMETER_TOLERANCE = 2e-5
# Of the LM logits' largest value, beside the tolerance: the reference's own are 2.6e-5 off the same maths in double.
LOGITS_ROUNDING = 1e-6
LOSSES = {"itc": "loss_itc", "itm": "loss_itm", "itg": "loss_lm"}


class Deviation(NamedTuple):
    case: str
    deviation: float
    allowed: float


def fixture_folder(name: str) -> Path:
    """Return a fixture's folder: the shared one where there is one beside the checkout, else the copy in tests/data."""
    root = Path(__file__).parents[1]
    shared = root.parent / "shared" / "fixtures" / name
    return shared if shared.exists() else root / "tests" / "data" / name


def is_stage1(folder: Path) -> bool:
    """Tell whether the folder is a stage-1 fixture."""
    return (folder / "config.json").exists() and "num_query_tokens" in json.loads((folder / "config.json").read_text())


class Reference:
    """A fixture folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.results = json.loads((folder / "results.json").read_text())
        self.inputs = self.tensors("inputs")

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    def model(self, **loss: Any) -> Stage1Model:
        """Return the fixture's model in double precision: what is left is the rounding of the reference's own fp32."""
        sizes = self.config
        config = QFormerConfig(
            hidden_size=sizes["hidden_size"],
            num_layers=sizes["num_hidden_layers"],
            num_heads=sizes["num_attention_heads"],
            intermediate_size=sizes["intermediate_size"],
            cross_attention_every=sizes["cross_attention_frequency"],
            num_queries=sizes["num_query_tokens"],
            vocab_size=sizes["vocab_size"],
            max_positions=sizes["max_position_embeddings"],
            layer_norm_eps=sizes["layer_norm_eps"],
            image_norm_eps=sizes["vision_layer_norm_eps"],
            projection_size=sizes["projection_dim"],
            dropout=0.0,
        )
        loss_config = Stage1LossConfig(label_smoothing=sizes["label_smoothing"], **loss)
        qformer = QFormer(config, sizes["vision_width"])
        model = Stage1Model(None, qformer, loss_config, plain.choose_hardest)
        with tempfile.TemporaryDirectory() as place:
            checkpoint = Path(place) / "lavis.pth"
            torch.save({"model": self.tensors("weights")}, checkpoint)
            load_trained(model, checkpoint)
        return model.double()

    def rows(self, rows: list[int] | None = None, *, image_ids: bool = False) -> Stage1Inputs:
        rows_B = torch.arange(self.inputs["input_ids"].shape[0]) if rows is None else torch.tensor(rows)
        return Stage1Inputs(
            input_ids_BT=self.inputs["input_ids"][rows_B],
            attention_mask_BT=self.inputs["attention_mask"][rows_B],
            valid_B=torch.ones_like(rows_B, dtype=torch.bool),
            rows_B=rows_B,
            image_ids_B=self.inputs["image_id"][rows_B] if image_ids else None,
            image_BPD=self.inputs["image_features"][rows_B].double(),
        )


def losses_and_gradients(
    model: Stage1Model,
    inputs: Stage1Inputs,
    size: int,
    communicator: Communicator | None = None,
    calls: list | None = None,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return the losses and the gradients of this rank under the original's names; list the backward calls."""
    model.zero_grad()
    calls = [] if calls is None else calls
    output = model.loss_and_backward(
        inputs,
        StepContext(communicator or LocalCommunicator(), size, backward=lambda loss: calls.append(loss.backward())),
    )
    return {LOSSES[name]: float(value) for name, value in output.parts.items()}, _gradients(model)


def plain_losses_and_gradients(model: Stage1Model, inputs: Stage1Inputs) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return what the plain implementation makes of the same weights and rows."""
    model.zero_grad()
    parts = plain.losses(model, inputs)
    plain.total(model, parts).backward()
    return {LOSSES[name]: float(value.detach()) for name, value in parts._asdict().items()}, _gradients(model)


def _gradients(model: Stage1Model) -> dict[str, Tensor]:
    parameters = lavis_parameters(model)
    return {n: torch.zeros_like(x) if x.grad is None else x.grad.clone() for n, x in parameters.items()}


def lavis_parameters(model: Stage1Model) -> dict[str, torch.nn.Parameter]:
    """Return the trainable parameters under the original's names."""
    return {str(reference_name(name, "lavis")): x for name, x in model.trainable_parameters().items()}


def check_stage1(folder: Path) -> Iterator[Deviation | str]:
    """Yield the largest deviation of every case, and the names of cases whose files are absent."""
    reference = Reference(folder)
    cases: dict[str, tuple[tuple[str, ...], Callable[[Reference], Iterator[Deviation]]]] = {
        "case 1: intermediates": (("case1_intermediates.safetensors",), _intermediates),
        "case 1: losses and gradients": (("case1_grads.safetensors",), _case1),
        "case 1: gradients per loss": (("case1_grads_per_loss.safetensors",), _per_loss),
        "case 1: gradient to both sides of the contrast": (("itc_full_gradient.safetensors",), _full_contrast),
        "case 2: two ranks": (("case2_grads_rank_mean.safetensors",), _case2),
        "case 3: image ids": (("case3_grads.safetensors",), _case3),
        "case 4: six AdamW steps": (
            ("case4_adamw_trajectory.json", "case4_params_after_6_steps.safetensors"),
            _case4,
        ),
    }
    for name, (files, check) in cases.items():
        absent = [file for file in files if not reference.has(file)]
        if absent:
            yield f"{name}: left out, no {', '.join(absent)}"
        else:
            yield from check(reference)


@torch.no_grad()
def _intermediates(reference: Reference) -> Iterator[Deviation]:
    expected, inputs = reference.tensors("case1_intermediates"), reference.rows()
    results, model = reference.results["case1_world1"], reference.model()
    negatives = [torch.tensor(results[f"neg_{x}_idx"]) for x in ("image", "text")]
    followed_BT = inputs.attention_mask_BT[:, 1:].bool()
    expected["lm_logits"] = expected["lm_logits"][:, :-1][followed_BT]
    for kind, intermediates in (("fast", _fast_intermediates), ("plain", _plain_intermediates)):
        for name, value in intermediates(model, inputs, *negatives).items():
            rounding = LOGITS_ROUNDING if name == "lm_logits" else 0.0
            deviation = _largest(value, expected[name], rounding=rounding)
            yield Deviation(f"case 1 {kind}: {name}", deviation, INTERMEDIATE_TOLERANCE)


def _fast_intermediates(model: Stage1Model, inputs: Stage1Inputs, image_B: Tensor, text_B: Tensor) -> dict[str, Tensor]:
    """Return the reference's intermediate values with the given negatives, as the product computes them."""
    ids_BT, mask_BT, qformer = inputs.input_ids_BT, inputs.attention_mask_BT, model.qformer
    assert inputs.image_BPD is not None
    text = pack_captions(ids_BT, mask_BT)
    encoded = model.encode(text, inputs.image_BPD)
    embedded = Rows(None, model.embed_text(text), text.packing)
    own_B = torch.arange(len(ids_BT))
    texts_M, images_M = torch.cat([own_B, own_B, text_B]), torch.cat([own_B, image_B, own_B])
    pairs, seen = pack_captions(ids_BT[texts_M], mask_BT[texts_M]), encoded.image_kv.select(images_M).layers
    start = Rows.join(qformer.queries(len(texts_M)), model.embed_text(pairs), pairs.packing)
    return {
        "query_hidden": qformer.encode_images(inputs.image_BPD),
        "text_cls_hidden": qformer(embedded, unimodal_mask(text.real_BT), kept_K=text.first_B).text_ND,
        **_similarities(model, encoded.image_BQE, encoded.text_BE),
        "itm_query_hidden": qformer(
            start, matching_mask(pairs.real_BT, qformer.config.num_queries), seen, kept_K=pairs.first_B
        ).query_BQD,
        "itm_logits": model.match(pairs, model.embed_text(pairs), seen),
        "lm_logits": qformer.language_head(encoded.source_KD, qformer.word_embeddings.weight),
    }


def _plain_intermediates(
    model: Stage1Model, inputs: Stage1Inputs, image_B: Tensor, text_B: Tensor
) -> dict[str, Tensor]:
    """Return the same values as the plain implementation computes them."""
    ids_BT, real_BT, qformer = inputs.input_ids_BT, inputs.attention_mask_BT.bool(), model.qformer
    image_BPC = qformer.ln_vision(inputs.image_BPD)
    image, text_BTD = plain.query_pass(qformer, image_BPC), plain.text_pass(qformer, ids_BT, real_BT)
    image_BQE = F.normalize(model.image_projection(image.rows_BLD), dim=-1)
    text_BE = F.normalize(model.text_projection(text_BTD[:, 0]), dim=-1)
    own_B = torch.arange(len(ids_BT))
    texts_M, images_M = torch.cat([own_B, own_B, text_B]), torch.cat([own_B, image_B, own_B])
    pairs = (ids_BT[texts_M], real_BT[texts_M], image_BPC[images_M])
    return {
        "query_hidden": image.rows_BLD,
        "text_cls_hidden": text_BTD[:, 0],
        **_similarities(model, image_BQE, text_BE),
        "itm_query_hidden": plain.multimodal_pass(qformer, *pairs),
        "itm_logits": plain.match(model, *pairs),
        "lm_logits": plain.generate(qformer, ids_BT, real_BT, image.inputs)[:, :-1][real_BT[:, 1:]],
    }


def _similarities(model: Stage1Model, image_BQE: Tensor, text_BE: Tensor) -> dict[str, Tensor]:
    similarity_BQB = image_BQE @ text_BE.T / model.temperature
    return {
        "image_feats": image_BQE,
        "text_feat": text_BE,
        "sim_i2t": similarity_BQB.amax(dim=1),
        "sim_t2i": similarity_BQB.amax(dim=1).T,
    }


def _case1(reference: Reference) -> Iterator[Deviation]:
    expected, wanted = reference.tensors("case1_grads"), reference.results["case1_world1"]["losses"]
    rows = len(reference.inputs["input_ids"])
    found = {
        f"case 1 fast, micro-batches of {size}": losses_and_gradients(reference.model(), reference.rows(), size)
        for size in (rows, rows - 1, max(1, rows // 2), max(1, rows // 3), 1)
    }
    found["case 1 plain"] = plain_losses_and_gradients(reference.model(), reference.rows())
    for case, (losses, gradients) in found.items():
        yield _losses(case, losses, wanted)
        yield gradient_deviation(case, gradients, expected)


def _per_loss(reference: Reference) -> Iterator[Deviation]:
    expected = reference.tensors("case1_grads_per_loss")
    for part, theirs in LOSSES.items():
        weights = {f"{other}_weight": float(other == part) for other in LOSSES}
        _, gradients = losses_and_gradients(reference.model(**weights), reference.rows(), 2)
        wanted = {name.removeprefix(f"{theirs}/"): x for name, x in expected.items() if name.startswith(f"{theirs}/")}
        yield gradient_deviation(f"case 1, only {part}", gradients, wanted)


def _full_contrast(reference: Reference) -> Iterator[Deviation]:
    model = reference.model(itc_grad="full", itm_weight=0.0, itg_weight=0.0)
    _, gradients = losses_and_gradients(model, reference.rows(), 2)
    yield gradient_deviation("contrast, both sides", gradients, reference.tensors("itc_full_gradient"))


def _case3(reference: Reference) -> Iterator[Deviation]:
    losses, gradients = losses_and_gradients(reference.model(), reference.rows(image_ids=True), 2)
    yield _losses("case 3, image ids", losses, reference.results["case3_image_id"]["losses"])
    yield gradient_deviation("case 3, image ids", gradients, reference.tensors("case3_grads"))


def _case2(reference: Reference) -> Iterator[Deviation]:
    """Compare two ranks; the original's LM mean is per rank, so that part is put together from the ranks' own means."""
    ranks = reference.config["rank_rows"]
    results = reference.results["case2_world2"]
    outputs = run_ranks(two_ranks, len(ranks), str(reference.folder))
    losses, gradients = outputs[0][0], {name: torch.from_numpy(x) for name, x in outputs[0][1].items()}
    for name in ("loss_itc", "loss_itm"):
        mean = sum(results[f"rank{rank}_losses"][name] for rank in range(len(ranks))) / len(ranks)
        yield Deviation(f"case 2, {name}", abs(losses[name] - mean), LOSS_TOLERANCE)
    for rank, rows in enumerate(ranks):
        model = reference.model(itc_weight=0.0, itm_weight=0.0)
        found, part = losses_and_gradients(model, reference.rows(rows), len(rows))
        gradients = {name: gradients[name] + part[name] / len(ranks) for name in gradients}
        wanted = results[f"rank{rank}_losses"]["loss_lm"]
        yield Deviation(f"case 2, loss_lm of rank {rank}", abs(found["loss_lm"] - wanted), LOSS_TOLERANCE)
    yield gradient_deviation("case 2", gradients, reference.tensors("case2_grads_rank_mean"))


def two_ranks(rank: int, world_size: int, folder: str) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the contrast and matching losses and the gradients summed over the ranks."""
    del world_size
    reference, communicator = Reference(Path(folder)), ProcessGroupCommunicator()
    rows = reference.config["rank_rows"][rank]
    losses, gradients = losses_and_gradients(
        reference.model(itg_weight=0.0), reference.rows(rows), len(rows), communicator
    )
    return losses, {name: communicator.all_reduce_sum(value).numpy() for name, value in gradients.items()}


def _case4(reference: Reference) -> Iterator[Deviation]:
    trajectory = json.loads((reference.folder / "case4_adamw_trajectory.json").read_text())
    model = reference.model()
    parameters = lavis_parameters(model)
    groups = [
        {"params": [parameters[name] for name in group["names"]], "weight_decay": group["weight_decay"]}
        for group in trajectory["param_groups"]
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    for step, wanted in enumerate(trajectory["trajectory"]):
        losses, _ = losses_and_gradients(model, reference.rows(), 6)
        yield _losses(f"case 4, before step {step}", losses, wanted)
        optimizer.step()
    for name, value in reference.tensors("case4_params_after_6_steps").items():
        yield Deviation(f"case 4, {name}", _largest(parameters[name].detach(), value), PARAMETER_TOLERANCE)


def _losses(case: str, losses: dict[str, float], expected: dict[str, float]) -> Deviation:
    return Deviation(f"{case}: losses", max(abs(losses[name] - expected[name]) for name in losses), LOSS_TOLERANCE)


def gradient_deviation(case: str, gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> Deviation:
    """Return the largest difference beyond 1e-4 of the expected value."""
    left = [((gradients[n] - x).abs() - 1e-4 * x.abs()).clamp_min(0).max() for n, x in expected.items()]
    return Deviation(f"{case}: {len(expected)} gradients", float(max(left)), GRADIENT_TOLERANCE)


def _largest(found: Tensor, expected: Tensor, rounding: float = 0.0) -> float:
    """Return the largest difference beyond `rounding` times the largest expected value."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return max(0.0, float((found - expected).abs().max()) - rounding * float(expected.abs().max()))
