"""Models that generate several candidate captions per image: our exports, and captioning models from transformers.

Letters: B images, N candidates of an image, R = B * N rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, LogitsProcessorList
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from isthmus.model.captioning.sampling import SeededNucleus
from isthmus.model.decoding import Decoding
from isthmus.model.errors import ModelError
from isthmus.model.formats.captioner import load_captioner
from isthmus.model.formats.native import DESCRIPTION
from isthmus.model.frozen.vision import image_statistics, silent_transformers
from isthmus.model.generate import generate_ids
from isthmus.model.safetensors_io import read_json

IMAGES_ONLY = ("blip", "git")
"""Types of transformers that caption an image without a prompt; our own loader reads BLIP-2."""


@dataclass(frozen=True)
class ImageInput:
    """How a model wants its images: square, normalised with these constants."""

    side_pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    central_square: bool = False
    """True: the central square of an image; False: the whole image, squeezed."""

    def normalize(self, images_BHWC: Tensor) -> Tensor:
        """Return uint8 squares as floats B, C, H, W."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (images_BHWC.permute(0, 3, 1, 2).float() / 255.0 - mean) / std


class Writer(Protocol):
    """A captioning model."""

    image_input: ImageInput

    def write(self, images_BHWC: Tensor, seeds: Sequence[Sequence[int]], decoding: Decoding) -> list[list[str]]:
        """Return as many texts per image (uint8 squares) as it has seeds; beams do not use the seeds' values."""
        ...


def open_writer(folder: Path) -> Writer:
    """Load a captioning model on the GPU if there is one.

    Args:
        folder: An export of stage 2 (ours, or BLIP-2 of transformers), or BLIP or GIT of transformers.

    Raises:
        ModelError: no such model, or one that cannot generate text.
    """
    if (folder / DESCRIPTION).exists():
        return _Bridge(folder)
    kind = AutoConfig.from_pretrained(folder).model_type if (folder / "config.json").exists() else None
    if kind == "blip-2":
        return _Bridge(folder)
    if kind in IMAGES_ONLY and _generates(folder, kind):
        return _Published(folder)
    raise ModelError(
        f"{folder}: cannot generate captions ({kind or 'no config.json'}); give an export of stage 2, or a captioning "
        f"folder of transformers: blip-2, {', '.join(IMAGES_ONLY)}"
    )


def _generates(folder: Path, kind: str) -> bool:
    """Tell whether a folder holds the captioning model of its type, not a retrieval or question-answering one."""
    held = read_json(folder / "config.json").get("architectures") or []
    return not held or MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[kind] in cast("list[str]", held)


class _Bridge:
    """Stage 2's model: BLIP-2."""

    def __init__(self, folder: Path) -> None:
        model, self._encoder = load_captioner(folder)
        self._device = device()
        self._model = model.to(self._device)
        vision = model.vision
        assert vision is not None  # an export holds its encoder
        self.image_input = ImageInput(vision.config.image_size_pixels, vision.image_mean, vision.image_std)

    def write(self, images_BHWC: Tensor, seeds: Sequence[Sequence[int]], decoding: Decoding) -> list[list[str]]:
        pixels_BCHW = self.image_input.normalize(images_BHWC).to(self._device)
        prompts = [self._encoder.config.prompt] * len(seeds)
        found = generate_ids(
            self._model, self._encoder, pixels_BCHW, prompts, decoding, len(seeds[0]), processors(seeds, decoding)
        )
        return _by_image([self._encoder.decode(ids) for ids in found], len(seeds[0]))


class _Published:
    """A captioning model of transformers that needs nothing but the image."""

    def __init__(self, folder: Path) -> None:
        self._device = device()
        with silent_transformers():
            self._model: Any = AutoModelForImageTextToText.from_pretrained(folder).eval().to(self._device)
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.image_input = image_input(folder, self._model.config.vision_config.image_size)

    @torch.no_grad()
    def write(self, images_BHWC: Tensor, seeds: Sequence[Sequence[int]], decoding: Decoding) -> list[list[str]]:
        ids_RT = self._model.generate(
            pixel_values=self.image_input.normalize(images_BHWC).to(self._device),
            logits_processor=processors(seeds, decoding),
            max_new_tokens=decoding.max_new_tokens,
            num_return_sequences=len(seeds[0]),
            do_sample=decoding.sample,
            num_beams=1 if decoding.sample else max(decoding.num_beams, len(seeds[0])),
            **({"top_p": 1.0, "top_k": 0, "temperature": 1.0} if decoding.sample else {}),
        )
        return _by_image(self._tokenizer.batch_decode(ids_RT, skip_special_tokens=True), len(seeds[0]))


def device() -> torch.device:
    """Return where models run: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def image_input(folder: Path, side_pixels: int) -> ImageInput:
    """Return how the processor of a transformers folder prepares images."""
    crop = read_json(folder / "preprocessor_config.json").get("do_center_crop", False)
    return ImageInput(side_pixels, *image_statistics(folder), central_square=bool(crop))


def processors(seeds: Sequence[Sequence[int]], decoding: Decoding) -> LogitsProcessorList:
    """Return what makes sampling a function of the seeds; nothing for beams."""
    if not decoding.sample:
        return LogitsProcessorList()
    flat = [seed for of_image in seeds for seed in of_image]
    return LogitsProcessorList([SeededNucleus(flat, decoding.top_p, decoding.temperature)])


def _by_image(texts: Sequence[str], count: int) -> list[list[str]]:
    return [[text.strip() for text in texts[i : i + count]] for i in range(0, len(texts), count)]
