"""Frozen image encoders behind one protocol: normalised images in, patch features B, P, D out.

A folder is in Hugging Face's format: config.json, preprocessor_config.json, *.safetensors. The features are what BLIP-2
reads: of CLIP the penultimate layer, of EVA-CLIP (Blip2VisionModel) the last layer before its LayerNorm, of any other
model its last hidden state; feature maps of CNNs are flattened to patches.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoConfig, AutoModel, Blip2VisionModel, CLIPVisionModel, Siglip2VisionModel, SiglipVisionModel
from transformers.utils import logging as transformers_logging

from isthmus.model.config import VisionConfig
from isthmus.model.errors import ModelError
from isthmus.model.frozen.efficientnet_lite import LITE0_STAGES, EfficientNetLite
from isthmus.model.safetensors_io import read_json, tensor_files

Features = Callable[[nn.Module, Tensor], Tensor]
EFFICIENTNET = "efficientnet-lite"
# Folders that hold more than the image encoder, and encoders that AutoModel does not know.
VISION_CLASSES: dict[str, Any] = {
    "blip-2": Blip2VisionModel,
    "blip_2_vision_model": Blip2VisionModel,
    "clip": CLIPVisionModel,
    "clip_vision_model": CLIPVisionModel,
    "siglip": SiglipVisionModel,
    "siglip_vision_model": SiglipVisionModel,
    "siglip2": Siglip2VisionModel,
    "siglip2_vision_model": Siglip2VisionModel,
}


class VisionEncoder(nn.Module):
    """A frozen encoder: always in eval mode, no gradient, never part of a checkpoint.

    Attributes:
        width: feature width D.
        num_patches: features per image P, class token included where the model has one.
        image_mean, image_std: per channel, for pixels in [0, 1].
    """

    _mean_C11: Tensor
    _std_C11: Tensor

    def __init__(
        self,
        network: nn.Module,
        features: Features,
        config: VisionConfig,
        image_mean: tuple[float, ...],
        image_std: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.config = config
        self.network = network
        self.image_mean, self.image_std = image_mean, image_std
        # On the device, so that no step copies them there.
        self.register_buffer(
            "_mean_C11", torch.tensor(image_mean, dtype=torch.float32)[:, None, None], persistent=False
        )
        self.register_buffer("_std_C11", torch.tensor(image_std, dtype=torch.float32)[:, None, None], persistent=False)
        self.num_patches, self.width = _feature_shape(network, features, config)
        self._features = features
        network.to(getattr(torch, config.torch_dtype)).requires_grad_(requires_grad=False)
        self.train(mode=False)

    def train(self, mode: bool = True) -> "VisionEncoder":
        """Stay in eval mode even if the parent is in training mode."""
        del mode
        return super().train(mode=False)

    def normalize(self, images_BCHW: Tensor) -> Tensor:
        """Return uint8 images, in any memory format, as contiguous floats with the encoder's mean and deviation."""
        images_BCHW = images_BCHW.to(torch.float32, memory_format=torch.contiguous_format)
        normalized_BCHW: Tensor = (images_BCHW / 255.0 - self._mean_C11) / self._std_C11
        return normalized_BCHW

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return B, P, D features in the configured dtype, `micro_batch_size` images at a time."""
        size = self.config.image_size_pixels
        if images_BCHW.shape[1:] != (3, size, size):
            raise ModelError(
                f"images are {tuple(images_BCHW.shape[1:])}, the encoder was set up for (3, {size}, {size}); "
                "make model.vision.image_size_pixels and the data's image size equal"
            )
        dtype = getattr(torch, self.config.torch_dtype)
        if images_BCHW.shape[0] == 0:
            return images_BCHW.new_zeros(0, self.num_patches, self.width, dtype=dtype)
        with torch.autocast(images_BCHW.device.type, enabled=False):
            parts = [
                self._features(self.network, part.to(dtype))
                for part in torch.split(images_BCHW, self.config.micro_batch_size)
            ]
        return torch.cat(parts)


def load_vision(config: VisionConfig, folder: Path) -> VisionEncoder:
    """Load the frozen encoder of a local folder; `config.path` is not read.

    Raises:
        ModelError: a file is absent, weights are missing or of another shape, or the image size does not fit.
    """
    network = empty_network(folder) if _kind(folder).startswith((EFFICIENTNET, "blip")) else _load_transformers(folder)
    if isinstance(network, EfficientNetLite):
        _load_strictly(network, folder, "")
        network.eval().fold_norms()
    elif isinstance(network, Blip2VisionModel):
        _load_strictly(network, folder, "vision_model.")
    return _encoder(network, config, folder)


def build_vision(config: VisionConfig, folder: Path) -> VisionEncoder:
    """Build the encoder of a local folder without its weights, for shapes; to be called under `torch.device("meta")`.

    Raises:
        ModelError: as `load_vision`, except for weights.
    """
    return _encoder(empty_network(folder), config, folder)


def empty_network(folder: Path) -> nn.Module:
    """Return the network that the folder's config.json describes, not loaded."""
    kind = _kind(folder)
    if kind == EFFICIENTNET:
        description = read_json(folder / "config.json")
        stages = tuple(tuple(stage) for stage in cast("list[list[int]]", description.get("stages", LITE0_STAGES)))
        return EfficientNetLite(cast("Any", stages), int(cast("int", description.get("hidden_size", 1280))))
    config = AutoConfig.from_pretrained(folder)
    vision_class: Any = VISION_CLASSES.get(kind)
    if vision_class is None:
        return cast("nn.Module", AutoModel.from_config(config))
    return cast("nn.Module", vision_class(getattr(config, "vision_config", config)))


def _kind(folder: Path) -> str:
    return str(read_json(folder / "config.json").get("model_type"))


def _encoder(network: nn.Module, config: VisionConfig, folder: Path) -> VisionEncoder:
    """Return the network as BLIP-2 reads it."""
    network = getattr(network, "vision_model", network)
    if isinstance(network, Blip2VisionModel):
        network.post_layernorm = nn.Identity()  # what BLIP-2 trains as ln_vision stands here
    if _kind(folder).startswith("clip"):
        clip: Any = network
        clip.encoder.layers = clip.encoder.layers[:-1]
        clip.post_layernorm = nn.Identity()
    features = _feature_map if isinstance(network, EfficientNetLite) else _features_of(network, config)
    return VisionEncoder(network, features, config, *image_statistics(folder))


def image_statistics(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return image_mean and image_std of preprocessor_config.json (or of the image part of processor_config.json)."""
    if (folder / "preprocessor_config.json").exists():
        content = read_json(folder / "preprocessor_config.json")
    else:
        content = cast("dict[str, object]", _image_part(folder))
    try:
        mean, std = (tuple(float(x) for x in cast("list[float]", content[key])) for key in ("image_mean", "image_std"))
    except KeyError as error:
        raise ModelError(
            f"{folder}: no {error} in preprocessor_config.json; copy that file from where the weights come from"
        ) from error
    return mean, std


def _image_part(folder: Path) -> object:
    if not (folder / "processor_config.json").exists():
        raise ModelError(
            f"{folder / 'preprocessor_config.json'}: not there; it holds the encoder's image_mean and image_std: "
            "copy it from where the weights come from"
        )
    return read_json(folder / "processor_config.json").get("image_processor", {})


def _load_transformers(folder: Path) -> nn.Module:
    vision_class: Any = VISION_CLASSES.get(_kind(folder), AutoModel)
    with silent_transformers():
        network, report = vision_class.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True)
    _check_report(report, folder)
    return cast("nn.Module", network)


def _check_report(report: dict[str, Any], folder: Path) -> None:
    """Refuse what transformers would draw at random; heads that features do not come from may be absent."""
    missing = sorted(name for name in report["missing_keys"] if "pooler" not in name and "head" not in name)
    if missing:
        raise ModelError(f"{folder}: {len(missing)} weights are missing, the first is {missing[0]}; copy all files")
    for name, found, wanted in sorted(report["mismatched_keys"]):
        raise ModelError(_other_shape(folder, name, found, wanted))


def _other_shape(folder: Path, name: str, found: Sequence[int], wanted: Sequence[int]) -> str:
    return (
        f"{folder}: {name} is {tuple(found)}, config.json makes it {tuple(wanted)}; "
        "config.json and weights are of different models"
    )


def _features_of(network: nn.Module, config: VisionConfig) -> Features:
    """Return how features are read from a transformers model."""
    description = cast("Any", network.config)
    if description.model_type.startswith("siglip2") and not hasattr(description, "image_size"):
        return _patchified
    trained = getattr(description, "image_size", config.image_size_pixels)
    trained = trained[0] if isinstance(trained, list | tuple) else trained
    if trained == config.image_size_pixels:
        return _last_hidden_state
    if description.model_type.startswith(("clip", "blip", "siglip", "dinov2", "vit")):
        return _interpolated
    raise ModelError(
        f"model.vision.image_size_pixels={config.image_size_pixels}, but the encoder was trained at {trained} and "
        f"{description.model_type} cannot interpolate its positions; set image_size_pixels={trained}"
    )


def _as_patches(output: Any) -> Tensor:
    hidden: Tensor = output.last_hidden_state
    return hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden


def _last_hidden_state(network: nn.Module, images_BCHW: Tensor) -> Tensor:
    return _as_patches(network(pixel_values=images_BCHW))


def _interpolated(network: nn.Module, images_BCHW: Tensor) -> Tensor:
    extra = {} if type(network).__name__.startswith("Dinov2") else {"interpolate_pos_encoding": True}
    return _as_patches(network(pixel_values=images_BCHW, **extra))


def _patchified(network: nn.Module, images_BCHW: Tensor) -> Tensor:
    """Feed square images to SigLIP2's variable-size encoder: patches of h x w x RGB values, row by row."""
    size = cast("Any", network.config).patch_size
    batch, _, height, width = images_BCHW.shape
    grid = (height // size, width // size)
    patches = images_BCHW.reshape(batch, 3, grid[0], size, grid[1], size).permute(0, 2, 4, 3, 5, 1)
    patches_BPD = patches.reshape(batch, grid[0] * grid[1], -1)
    shapes_B2 = torch.tensor([grid] * batch)
    return _as_patches(network(patches_BPD, pixel_attention_mask=None, spatial_shapes=shapes_B2))


def _feature_map(network: nn.Module, images_BCHW: Tensor) -> Tensor:
    features_BCHW: Tensor = network(images_BCHW)
    return features_BCHW.flatten(2).transpose(1, 2)


def _load_strictly(network: nn.Module, folder: Path, prefix: str) -> None:
    """Copy every tensor of `network` from the folder, whose names may carry `prefix`."""
    files = tensor_files(folder)
    with torch.no_grad(), ExitStack() as stack:
        opened = cache(lambda path: stack.enter_context(safe_open(str(path), "pt")))
        for name, tensor in network.state_dict().items():
            found = next((candidate for candidate in (prefix + name, name) if candidate in files), None)
            if found is None:
                raise ModelError(f"{folder}: weight {name} is missing; copy all files of the model")
            value = opened(files[found]).get_tensor(found)
            if value.shape != tensor.shape:
                raise ModelError(_other_shape(folder, found, value.shape, tensor.shape))
            tensor.copy_(value)


class _Bound(nn.Module):
    """An encoder with the way its features are read, as one module."""

    def __init__(self, network: nn.Module, features: Features) -> None:
        super().__init__()
        self.network, self._features = network, features

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self._features(self.network, images_BCHW)


@torch.no_grad()
def _feature_shape(network: nn.Module, features: Features, config: VisionConfig) -> tuple[int, int]:
    """Return patches and width of one image's features, from shapes alone: the weights stand in as meta tensors."""
    bound, size = _Bound(network, features).eval(), config.image_size_pixels
    tensors = {name: tensor.to("meta") for name, tensor in (*bound.named_parameters(), *bound.named_buffers())}
    image = torch.zeros(1, 3, size, size, dtype=torch.float32, device="meta")
    return cast("tuple[int, int]", tuple(functional_call(bound, tensors, (image,)).shape[1:]))


@contextmanager
def silent_transformers() -> Iterator[None]:
    """Keep transformers from printing progress and reports, errors excepted: what matters in them is checked here."""
    verbosity, shows_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shows_bars:
            transformers_logging.enable_progress_bar()
