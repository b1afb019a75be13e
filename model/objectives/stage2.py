"""Stage 2: Q-Former and projection learn to write into the frozen language model (BLIP-2, section 3.3).

Letters: B rows on this rank, Q queries, P patches, T text tokens, D width, V vocabulary.

The loss is the cross-entropy summed over all target tokens of the GLOBAL batch, divided by their number, so neither
micro-batches nor ranks change it. The original averages per rank, which weights short captions by their neighbours.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from isthmus.model.errors import ModelError
from isthmus.model.frozen.language import LanguageModel
from isthmus.model.frozen.vision import VisionEncoder
from isthmus.model.objectives.step import LossOutput, StepContext, check_rows
from isthmus.model.qformer.qformer import QFormer
from isthmus.model.text.language_batch import IGNORED, LanguageTokens, pack_language_tokens


@dataclass(frozen=True)
class Stage2Inputs:
    """One rank's rows of a step: images or their features, and the language model's tokens."""

    tokens: Mapping[str, Tensor]
    """input_ids, attention_mask, labels as `LanguageEncoder` gives them: int64 B, T."""
    valid_B: Tensor
    """bool; False: the row takes part in no loss."""
    rows_B: Tensor
    """int64, row in the global batch."""
    images_BCHW: Tensor | None = None
    """Float, normalised."""
    image_BPD: Tensor | None = None
    """Features of the vision encoder, instead of images."""
    texts: tuple[LanguageTokens, ...] | None = None
    """`pack_language_tokens` of the host's tokens. None means that the step packs them and waits for the device."""

    def packed(self, micro_batch_size: int, *, is_encoder_decoder: bool) -> "Stage2Inputs":
        """Return the same rows with `texts`, made from a host copy of the tokens unless they are there.

        Raises:
            ModelError: tensors do not belong together, or a valid row has no target.
        """
        tensors = {**self.tokens, **{name: x for name, x in vars(self).items() if isinstance(x, Tensor)}}
        ids, mask = self.tokens["input_ids"], self.tokens["attention_mask"]
        check_rows("stage 2", len(self.valid_B), tensors, ids, mask)
        if self.texts and self.texts[0].batch == min(micro_batch_size, len(self.valid_B)):
            return self
        tokens = {name: tensor.cpu() for name, tensor in self.tokens.items()}
        texts = pack_language_tokens(
            tokens, self.valid_B.cpu(), micro_batch_size, is_encoder_decoder=is_encoder_decoder
        )
        return replace(self, texts=tuple(text.to(self.valid_B.device) for text in texts))


class Stage2Model(nn.Module):
    """Vision encoder (frozen) -> ln_vision -> Q-Former's query side -> projection -> language model (frozen)."""

    def __init__(self, vision: VisionEncoder | None, qformer: QFormer, language: LanguageModel) -> None:
        super().__init__()
        num_queries, context = qformer.config.num_queries, language.context_tokens
        if context is not None and num_queries + language.config.max_text_tokens > context:
            raise ModelError(
                f"qformer.num_queries = {num_queries} and model.language.max_text_tokens = "
                f"{language.config.max_text_tokens} exceed the language model's context of {context}; lower either"
            )
        self.vision = vision
        self.qformer = qformer
        self.projection = nn.Linear(qformer.config.hidden_size, language.width)
        self.language = language

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Name what stage 2 optimises: ln_vision, the query side of the Q-Former (no text part) and the projection."""
        return {
            **{f"qformer.{name}": parameter for name, parameter in self.qformer.query_side_parameters().items()},
            **{f"projection.{name}": parameter for name, parameter in self.projection.named_parameters()},
        }

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Return the frozen encoder's features, B, P, D."""
        if self.vision is None:
            raise ModelError("stage 2 was built without a vision encoder; give image features instead of images")
        features: Tensor = self.vision(images_BCHW)
        return features

    def visual(self, image_BPD: Tensor) -> Tensor:
        """Return what the language model sees of the image: B, Q, width of its embeddings."""
        projected: Tensor = self.projection(self.qformer.encode_images(image_BPD))
        return projected

    def loss_and_backward(self, batch: Stage2Inputs, context: StepContext) -> LossOutput:
        """Compute the loss of the global batch and call `backward` once per micro-batch.

        Over all calls and ranks the gradients add up to that of the global loss. Dropout masks are a function of (seed,
        step, rank, micro-batch), or of the virtual rank; torch's global generators are reseeded.

        Raises:
            ModelError: shapes that do not fit, or a valid row without a target; on the rank that has it.
        """
        communicator, backward = context.communicator, context.backward
        rows = context.rows_at_once(len(batch.valid_B))
        batch = batch.packed(rows, is_encoder_decoder=self.language.is_encoder_decoder)
        assert batch.texts is not None
        image = batch.images_BCHW if batch.image_BPD is None else batch.image_BPD
        if image is None:
            raise ModelError("stage 2 got neither images_BCHW nor image_BPD; give one of them")
        num_targets = (torch.cat([text.label_K for text in batch.texts]) != IGNORED).sum()
        counts = communicator.all_reduce_sum(torch.stack([num_targets, batch.valid_B.sum()])).float()
        losses = []
        for i, (text, part) in enumerate(zip(batch.texts, torch.split(image, rows), strict=True)):
            if self.training:
                context.seed_dropout(i, "step")
            with torch.set_grad_enabled(backward is not None):
                image_BPD = self.encode(part) if batch.image_BPD is None else part
                loss = self.language(self.visual(image_BPD), text) / counts[0].clamp_min(1)
            if backward is not None:
                backward(loss)
            context.end_micro_batch()
            losses.append(loss.detach().double())
        mean = communicator.sum_parts(losses, fixed_order=context.fixed_order).float()
        return LossOutput(mean, {"lm": mean}, {"target_tokens": counts[0], "valid": counts[1]})
