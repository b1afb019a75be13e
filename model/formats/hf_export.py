"""Export to Hugging Face transformers: folders that `from_pretrained` loads offline, weights, processor and tokenizer.

What transformers' BLIP-2 can hold: an EVA-CLIP encoder (`Blip2VisionModel`), any causal or T5 language model. Other
encoders go to our own format (formats/native.py). Tensor names inside the files differ from those of the frozen
models' own folders, so frozen weights are copied here; only our own format can link them.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import processors
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Blip2Config,
    Blip2Processor,
    BlipImageProcessorPil,
    GenerationConfig,
)

from isthmus.model.config import LanguageConfig, QFormerConfig, VisionConfig
from isthmus.model.errors import ModelError
from isthmus.model.formats.key_mapping import reference_name
from isthmus.model.formats.native import WEIGHTS, bridge_configs
from isthmus.model.frozen.language import LanguageModel, build_language
from isthmus.model.frozen.vision import image_statistics
from isthmus.model.imports.tensors import open_tensors
from isthmus.model.safetensors_io import Source, read_json, refuse_existing, replace_folder, write_tensors
from isthmus.model.text.language_tokenizer import LanguageEncoder

logger = logging.getLogger(__name__)
HF_IMAGE_NORM_EPS = 1e-6
HF_VISION_TYPES = ("blip-2", "blip_2_vision_model")
IMAGE_TOKEN = "<image>"  # noqa: S105 - the placeholder's name in transformers


def hf_can_hold(vision_folder: Path) -> bool:
    """Tell whether transformers' BLIP-2 has this image encoder."""
    return read_json(vision_folder / "config.json").get("model_type") in HF_VISION_TYPES


def export_captioner(
    folder: Path,
    trained: Mapping[str, Tensor],
    qformer: QFormerConfig,
    vision: tuple[VisionConfig, Path],
    language: tuple[LanguageConfig, Path],
) -> None:
    """Write a `Blip2ForConditionalGeneration` folder from stage 2, atomically.

    Args:
        folder: Target; replaced where it exists.
        trained: Tensors by the names of `Stage2Model.trainable_parameters`; more (stage 1's) are left out.
        qformer: Dimensions.
        vision: Configuration of the encoder and its local folder.
        language: Configuration of the language model and its local folder.

    Raises:
        ModelError: transformers cannot hold this encoder, or tensors are missing.
    """
    language_config, language_folder = language
    encoder = LanguageEncoder(language_folder, language_config)
    tokenizer = _tokenizer_with_start(encoder)
    processor = _processor(vision, tokenizer, qformer.num_queries)
    image_token = int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    text_config = _text_config(encoder, image_token)
    parts = {"text_config": text_config, "image_token_index": image_token}
    config = _config(vision[1], qformer, "Blip2ForConditionalGeneration", language_config.torch_dtype, **parts)
    with torch.device("meta"):
        skeleton = build_language(language_config, language_folder)
    sources = [
        *_trained_sources(trained, [n for n in trained if n.startswith("projection.") or _is_query_side(n)]),
        *_vision_sources(vision[1]),
        *_language_sources(skeleton, language_folder, text_config["vocab_size"]),
    ]
    with replace_folder(folder) as target:
        write_tensors(target, sources)
        config.save_pretrained(target)
        processor.save_pretrained(target)
        _generation_config(encoder, skeleton, image_token).save_pretrained(target)


def export_retriever(
    folder: Path,
    trained: Mapping[str, Tensor],
    qformer: QFormerConfig,
    vision: tuple[VisionConfig, Path],
    tokenizer_folder: Path,
) -> None:
    """Write a `Blip2ForImageTextRetrieval` folder from stage 1, atomically; the language head has no place there.

    Raises:
        ModelError: transformers cannot hold this encoder, or tensors are missing.
    """
    processor = _processor(vision, AutoTokenizer.from_pretrained(tokenizer_folder), None)
    dtype = str(trained["qformer.query_tokens"].dtype).removeprefix("torch.")
    parts = {"image_text_hidden_size": qformer.projection_size}
    config = _config(vision[1], qformer, "Blip2ForImageTextRetrieval", dtype, **parts)
    names = [name for name in trained if reference_name(name, "hf") and not name.startswith("projection.")]
    with replace_folder(folder) as target:
        write_tensors(target, [*_trained_sources(trained, names), *_vision_sources(vision[1])])
        config.save_pretrained(target)
        processor.save_pretrained(target)


def export_native(source: Path, folder: Path) -> None:
    """Write a native export as the folder that transformers' BLIP-2 has for its stage, atomically.

    Raises:
        ModelError: the folder exists, transformers cannot hold the encoder, or stage 1's export has no tokenizer.
    """
    refuse_existing(folder)
    qformer, vision, language = bridge_configs(source)
    trained = load_file(source / WEIGHTS)
    if language is not None:
        export_captioner(folder, trained, qformer, (vision, source / "vision"), (language, source / "language"))
    elif (source / "tokenizer").exists():
        export_retriever(folder, trained, qformer, (vision, source / "vision"), source / "tokenizer")
    else:
        raise ModelError(f"{source}: has no tokenizer/, which transformers' retrieval model needs; copy BERT's there")


def _is_query_side(name: str) -> bool:
    return reference_name(name, "hf") is not None and not any(
        part in name for part in ("text_ffn", "_embeddings", "itm_head", "_projection")
    )


def _vision_config(folder: Path, qformer: QFormerConfig) -> dict[str, Any]:
    content = read_json(folder / "config.json")
    if content.get("model_type") not in HF_VISION_TYPES:
        raise ModelError(
            f"{folder}: transformers' BLIP-2 cannot hold an image encoder of type {content.get('model_type')} (only "
            f"{', '.join(HF_VISION_TYPES)}); use the native format instead (--to own) (docs/export-format.md)"
        )
    inner = content.get("vision_config", content)
    assert isinstance(inner, dict)
    eps = inner.get("layer_norm_eps", HF_IMAGE_NORM_EPS)
    if eps != qformer.image_norm_eps:
        logger.warning(
            "export: ln_vision was trained with eps %g, transformers computes it with the encoder's %g; outputs differ "
            "in the sixth digit. Set model.qformer.image_norm_eps=%g in future runs", qformer.image_norm_eps, eps, eps,
        )  # fmt: skip
    return inner


def _text_config(encoder: LanguageEncoder, image_token: int) -> dict[str, Any]:
    """Return the language model's own configuration with a row for the image token, and the tokens of training."""
    config = AutoConfig.from_pretrained(encoder.folder)
    config.vocab_size = max(config.vocab_size, image_token + 1)
    config.eos_token_id = encoder.stop_id
    config.dtype = encoder.config.torch_dtype
    if config.pad_token_id is None:
        config.pad_token_id = encoder.pad_id
    return {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}


def _config(vision_folder: Path, qformer: QFormerConfig, architecture: str, dtype: str, **parts: Any) -> Blip2Config:
    return Blip2Config(
        vision_config=_vision_config(vision_folder, qformer),
        qformer_config=_qformer_config(qformer, with_text="text_config" not in parts),
        num_query_tokens=qformer.num_queries,
        architectures=[architecture],
        dtype=dtype,
        **parts,
    )


def _qformer_config(config: QFormerConfig, *, with_text: bool) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "max_position_embeddings": config.max_positions,
        "layer_norm_eps": config.layer_norm_eps,
        "cross_attention_frequency": config.cross_attention_every,
        "use_qformer_text_input": with_text,
    }


def _processor(vision: tuple[VisionConfig, Path], tokenizer: Any, num_queries: int | None) -> Any:
    size = vision[0].image_size_pixels
    mean, std = image_statistics(vision[1])
    # The PIL variant needs no torchvision.
    image_processor = BlipImageProcessorPil(
        size={"height": size, "width": size}, image_mean=list(mean), image_std=list(std)
    )
    return Blip2Processor(image_processor, tokenizer, num_query_tokens=num_queries)


def _tokenizer_with_start(encoder: LanguageEncoder) -> Any:
    """Return a tokenizer that adds the start token (or T5's end token) where training had it."""
    tokenizer = encoder.tokenizer
    wanted = [encoder.stop_id] if encoder.is_encoder_decoder else encoder.prompt_ids("")
    if tokenizer("").input_ids != wanted:
        token = tokenizer.convert_ids_to_tokens(wanted[0])
        template = f"$A {token}" if encoder.is_encoder_decoder else f"{token} $A"
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(token, wanted[0])]
        )
    return tokenizer


def _generation_config(encoder: LanguageEncoder, language: LanguageModel, image_token: int) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=30,
        num_beams=5,
        eos_token_id=encoder.stop_id,
        pad_token_id=encoder.pad_id,
        decoder_start_token_id=language.decoder_start_id,
        suppress_tokens=[image_token],
    )


def _trained_sources(trained: Mapping[str, Tensor], names: list[str]) -> Iterator[Source]:
    if not names:
        raise ModelError("nothing to export: none of the given tensors has a name of this stage")
    for name in names:
        theirs = reference_name(name, "hf")
        assert theirs is not None
        yield theirs, partial(trained.__getitem__, name)


def _vision_sources(folder: Path) -> Iterator[Source]:
    for name, tensor in open_tensors(folder).items():
        bare = name.removeprefix("vision_model.")
        if bare.startswith(("embeddings.", "encoder.")):  # a whole BLIP-2 folder holds more; ln_vision is ours
            yield f"vision_model.{bare}", tensor.read


def _language_sources(skeleton: LanguageModel, folder: Path, vocab_size: int) -> Iterator[Source]:
    """Give the frozen tensors under transformers' names; vocabulary matrices grow by rows of zeros where needed."""
    tensors = open_tensors(folder)
    parameters = dict(skeleton.named_parameters())
    heads = (skeleton.model.get_input_embeddings(), skeleton.model.get_output_embeddings())
    vocabulary = {id(head.weight) for head in heads}
    for name, tensor_name in skeleton.weight_names.items():
        read = tensors[tensor_name].read
        grows = id(parameters[name]) in vocabulary and parameters[name].shape[0] < vocab_size
        yield f"language_model.{name.removeprefix('model.')}", _grown(read, vocab_size) if grows else read


def _grown(read: Callable[[], Tensor], rows: int) -> Callable[[], Tensor]:
    def grow() -> Tensor:
        tensor = read()
        return torch.cat([tensor, tensor.new_zeros(rows - tensor.shape[0], *tensor.shape[1:])])

    return grow
