"""Text generation from images: captions and answers from the frozen language model.

Decoding is `transformers.generate` on embeddings: beams, sampling and the key-value cache are exactly what an exported
model runs, so training samples and the exported model say the same. Where the language model is a ZeRO-3 partition,
`synced_gpus` keeps every rank in the forward passes until the last rank's last row has ended; each rank must then make
the same calls, with any number of rows of its own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList

from isthmus.model.decoding import Decoding
from isthmus.model.errors import ModelError
from isthmus.model.frozen.language import LanguageModel
from isthmus.model.objectives.stage2 import Stage2Model
from isthmus.model.text.language_tokenizer import LanguageEncoder

QUESTION = "Question: {} Answer:"
CAPTION_DECODING, ANSWER_DECODING = Decoding(), Decoding(max_new_tokens=10, length_penalty=-1.0)


def caption(
    model: Stage2Model,
    encoder: LanguageEncoder,
    images: Tensor,
    *,
    prompt: str | None = None,
    decoding: Decoding = CAPTION_DECODING,
) -> list[str]:
    """Return one caption per image.

    Args:
        model: Stage-2 model.
        encoder: Its tokeniser.
        images: Normalised images B, C, H, W or vision features B, P, D.
        prompt: Text that the captions continue; None means the prompt of training.
        decoding: Beams or sampling, and the longest text.

    Raises:
        ModelError: queries, prompt and new tokens exceed the language model's context.
    """
    text = encoder.config.prompt if prompt is None else prompt
    return generate(model, encoder, images, [text] * images.shape[0], decoding)


def answer(
    model: Stage2Model,
    encoder: LanguageEncoder,
    images: Tensor,
    questions: Sequence[str],
    *,
    template: str = QUESTION,
    decoding: Decoding = ANSWER_DECODING,
) -> list[str]:
    """Return the answer to one question per image; arguments and errors as in `caption`."""
    return generate(model, encoder, images, [template.format(question) for question in questions], decoding)


def generate(
    model: Stage2Model, encoder: LanguageEncoder, images: Tensor, prompts: Sequence[str], decoding: Decoding
) -> list[str]:
    """Return the continuation of one prompt per image."""
    return [encoder.decode(ids) for ids in generate_ids(model, encoder, images, prompts, decoding)]


@torch.no_grad()
def generate_ids(
    model: Stage2Model,
    encoder: LanguageEncoder,
    images: Tensor,
    prompts: Sequence[str],
    decoding: Decoding,
    texts_per_image: int = 1,
    processors: LogitsProcessorList | None = None,
) -> list[list[int]]:
    """Return the new tokens of `texts_per_image` continuations per image, those of an image together.

    With `processors`, which then choose every token themselves, sampling leaves the logits as they are.
    """
    if len(prompts) != images.shape[0]:
        raise ModelError(f"{images.shape[0]} images but {len(prompts)} prompts; give one prompt per image")
    language = model.language
    config = _generation_config(language, encoder, decoding, texts_per_image, warp=not processors)
    with evaluating(model):
        visual_BQD = model.visual(images if images.dim() == 3 else model.encode(images))
        ids = [encoder.prompt_ids(prompt) for prompt in prompts]
        num_prompt_tokens = max(map(len, ids), default=0)
        _check_context(language, visual_BQD.shape[1], num_prompt_tokens, decoding.max_new_tokens)
        config.min_new_tokens = decoding.min_new_tokens(1 if language.is_encoder_decoder else num_prompt_tokens)
        devices = [images.device] if images.is_cuda else []
        # The language model runs in its own type, as in training.
        with torch.random.fork_rng(devices=devices), torch.autocast(images.device.type, enabled=False):
            torch.manual_seed(decoding.seed)
            embeds_BLD, mask_BL = _prompt_inputs(language, encoder, visual_BQD, ids)
            new_ids_RT = language.model.generate(
                inputs_embeds=embeds_BLD,
                attention_mask=mask_BL,
                generation_config=config,
                logits_processor=processors,
                synced_gpus=_is_partitioned(language),
            )
    start = 1 if language.is_encoder_decoder else 0
    return [row[start:] for row in new_ids_RT.tolist()]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _prompt_inputs(
    language: LanguageModel, encoder: LanguageEncoder, visual_BQD: Tensor, ids: list[list[int]]
) -> tuple[Tensor, Tensor]:
    """Return embeddings B, L, D and mask B, L: for a decoder left-padded, so that each row ends with its prompt."""
    end = [encoder.stop_id] if language.is_encoder_decoder else []
    rows = [row + end for row in ids]
    width = max(map(len, rows), default=0)
    padded = [row + [encoder.pad_id] * (width - len(row)) for row in rows]
    ids_BT = torch.tensor(padded, dtype=torch.int64, device=visual_BQD.device).reshape(len(rows), width)
    lengths_B1 = torch.tensor([[len(row)] for row in rows], device=visual_BQD.device)
    mask_BT = (torch.arange(width, device=visual_BQD.device) < lengths_B1).long()
    embeds_BLD, mask_BL = language.inputs(visual_BQD, ids_BT, mask_BT)
    if language.is_encoder_decoder:
        return embeds_BLD, mask_BL
    num_positions = mask_BL.shape[1]
    source_BL = (torch.arange(num_positions, device=visual_BQD.device) - (width - lengths_B1)) % num_positions
    return torch.take_along_dim(embeds_BLD, source_BL[..., None], dim=1), torch.take_along_dim(
        mask_BL, source_BL, dim=1
    )


def _generation_config(
    language: LanguageModel, encoder: LanguageEncoder, decoding: Decoding, texts_per_image: int, *, warp: bool
) -> GenerationConfig:
    sampling: dict[str, float] = {}
    if decoding.sample:
        sampling = {"temperature": decoding.temperature, "top_p": decoding.top_p} if warp else {"top_k": 0}
    num_beams = 1 if decoding.sample else max(decoding.num_beams, texts_per_image)
    beams = {"length_penalty": decoding.length_penalty} if num_beams > 1 else {}
    eos = encoder.tokenizer.eos_token_id
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        num_beams=num_beams,
        num_return_sequences=texts_per_image,
        do_sample=decoding.sample,
        eos_token_id=sorted({encoder.stop_id} | ({int(eos)} if eos is not None else set())),
        pad_token_id=encoder.pad_id,
        decoder_start_token_id=language.decoder_start_id,
        **sampling,
        **beams,
    )


def _is_partitioned(language: LanguageModel) -> bool:
    """Tell whether other ranks must run the same forwards: DeepSpeed marks the parameters that it partitions."""
    several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    return several and any(hasattr(parameter, "ds_id") for parameter in language.parameters())


def _check_context(language: LanguageModel, num_queries: int, num_prompt_tokens: int, num_new_tokens: int) -> None:
    context = language.context_tokens
    if context is not None and num_queries + num_prompt_tokens + num_new_tokens > context:
        raise ModelError(
            f"{num_queries} queries + {num_prompt_tokens} prompt tokens + {num_new_tokens} new tokens exceed the "
            f"language model's context of {context}; shorten the prompt or lower max_new_tokens"
        )
