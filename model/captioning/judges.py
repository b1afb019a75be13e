"""Models that score how well texts fit an image: contrast and matching of stage 1, and CLIP or SigLIP.

Letters: B images, K texts of each, M = B * K pairs, D width, E projection width, Q queries, T tokens.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer

from isthmus.model.captioning.writers import ImageInput, device, image_input
from isthmus.model.config import QFormerConfig
from isthmus.model.errors import ModelError
from isthmus.model.formats.hf_import import import_blip2
from isthmus.model.formats.native import DESCRIPTION, bridge_configs, load_trained
from isthmus.model.frozen.vision import load_vision, silent_transformers
from isthmus.model.objectives.stage1 import Stage1Model
from isthmus.model.qformer.packing import pack_captions
from isthmus.model.qformer.qformer import QFormer
from isthmus.model.safetensors_io import read_json
from isthmus.model.text.qformer_tokenizer import QFormerEncoder

CONTRASTIVE = ("clip", "siglip", "siglip2")
"""Types of transformers that embed images and texts in one space."""
MAX_TEXT_TOKENS = 32
"""Of BLIP-2's matching and contrast; longer texts are cut."""


class Judge(Protocol):
    """A model that scores pairs."""

    image_input: ImageInput
    scores: tuple[str, ...]
    """Names of what it measures."""

    def score(self, images_BHWC: Tensor, texts: Sequence[Sequence[str]]) -> dict[str, Tensor]:
        """Return each score of K texts per image (uint8 squares): fp32 B, K."""
        ...


def open_judge(folder: Path) -> Judge:
    """Load a scoring model on the GPU if there is one.

    Args:
        folder: An export of stage 1 (ours, or `Blip2ForImageTextRetrieval` of transformers), or CLIP or SigLIP.

    Raises:
        ModelError: none of them.
    """
    kind = AutoConfig.from_pretrained(folder).model_type if (folder / "config.json").exists() else None
    if kind in CONTRASTIVE:
        return _Contrastive(folder)
    if (folder / DESCRIPTION).exists():
        return _Stage1(folder)
    if kind != "blip-2":
        raise ModelError(
            f"{folder}: cannot score pairs ({kind or 'no config.json'}); give an export of stage 1, or a folder of "
            f"transformers: blip-2 for retrieval, {', '.join(CONTRASTIVE)}"
        )
    with tempfile.TemporaryDirectory() as place:
        import_blip2(folder, Path(place) / "native")
        return _Stage1(Path(place) / "native")


class _Stage1:
    """`itc`: cosine of the best query with the text. `itm`: probability of a match (BLIP-2, section 3.2)."""

    scores: tuple[str, ...] = ("itc", "itm")

    def __init__(self, folder: Path) -> None:
        qformer, vision_config, _ = bridge_configs(folder)
        if not (folder / "tokenizer").is_dir():
            raise ModelError(f"{folder}: has no tokenizer for texts; give an export of stage 1 (export --stage stage1)")
        vision = load_vision(vision_config, folder / "vision")
        self._model = Stage1Model(vision, QFormer(qformer, vision.width))
        load_trained(self._model, folder)
        self._device = device()
        self._model.eval().to(self._device)
        self._encoder = _text_encoder(folder / "tokenizer", qformer)
        self.image_input = ImageInput(vision_config.image_size_pixels, vision.image_mean, vision.image_std)

    @torch.no_grad()
    def score(self, images_BHWC: Tensor, texts: Sequence[Sequence[str]]) -> dict[str, Tensor]:
        model, per_image = self._model, len(texts[0])
        tokens = self._encoder([text for of_image in texts for text in of_image])
        packed = pack_captions(tokens["input_ids"], tokens["attention_mask"]).to(self._device)
        assert model.vision is not None
        image_BPD = model.vision(self.image_input.normalize(images_BHWC).to(self._device))
        image_BQE, text_ME = model.image_vectors(image_BPD), model.text_vectors(packed)
        text_BKE = text_ME.reshape(len(texts), per_image, -1)
        itc_BK = torch.einsum("bqe,bke->bkq", image_BQE, text_BKE).amax(dim=2)
        image_M = torch.arange(len(texts), device=self._device).repeat_interleave(per_image)
        image_kv = model.qformer.image_kv(image_BPD).select(image_M)
        logits_M2 = model.match(packed, model.embed_text(packed), image_kv.layers)
        itm_BK = logits_M2.float().softmax(dim=1)[:, 1].reshape(len(texts), per_image)
        return {"itc": itc_BK.cpu(), "itm": itm_BK.cpu()}


def _text_encoder(folder: Path, qformer: QFormerConfig) -> QFormerEncoder:
    encoder = QFormerEncoder(folder, min(MAX_TEXT_TOKENS, qformer.max_positions))
    encoder.check(qformer)
    return encoder


class _Contrastive:
    """`clip`: cosine of the image's and the text's embedding."""

    scores: tuple[str, ...] = ("clip",)

    def __init__(self, folder: Path) -> None:
        self._device = device()
        with silent_transformers():
            self._model: Any = AutoModel.from_pretrained(folder).eval().to(self._device)
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._length = int(self._model.config.text_config.max_position_embeddings)
        # SigLIP was trained on texts whose padding is attended to.
        self._inputs = ("input_ids", "attention_mask") if self._model.config.model_type == "clip" else ("input_ids",)
        self.image_input = image_input(folder, _side(folder, self._model))

    @torch.no_grad()
    def score(self, images_BHWC: Tensor, texts: Sequence[Sequence[str]]) -> dict[str, Tensor]:
        tokens = self._tokenizer(
            [text for of_image in texts for text in of_image],
            padding="max_length",
            max_length=self._length,
            truncation=True,
            return_tensors="pt",
        ).to(self._device)
        pixels_BCHW = self.image_input.normalize(images_BHWC).to(self._device)
        image_BE = _unit(self._model.get_image_features(pixel_values=pixels_BCHW))
        text_ME = _unit(self._model.get_text_features(**{name: tokens[name] for name in self._inputs}))
        text_BKE = text_ME.reshape(len(texts), len(texts[0]), -1)
        return {"clip": torch.einsum("be,bke->bk", image_BE, text_BKE).cpu()}


def _unit(features: Any) -> Tensor:
    vectors: Tensor = getattr(features, "pooler_output", features)
    return F.normalize(vectors.float(), dim=-1)


def _side(folder: Path, model: Any) -> int:
    """Return the side of the images; SigLIP 2 of variable size has no fixed one and is refused."""
    side = getattr(model.config.vision_config, "image_size", None)
    if side is None:
        held = read_json(folder / "config.json").get("model_type")
        raise ModelError(f"{folder}: {held} of variable image size; give a model of fixed size, such as siglip or clip")
    return int(side)
