"""Stage 2: Q-Former and projection learn to write into the frozen language model (BLIP-2, section 3.3).

Letters: B rows on this rank, Q queries, P patches, T text tokens, D width, V vocabulary.

The loss is the cross-entropy summed over all target tokens of the GLOBAL batch, divided by their number, so neither
micro-batches nor ranks change it. The original averages per rank, which weights short captions by their neighbours.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isthmus.model.errors import ModelError
from isthmus.model.frozen.language import IGNORED, LanguageModel
from isthmus.model.frozen.vision import VisionEncoder
from isthmus.model.objectives.communicator import Communicator
from isthmus.model.objectives.losses import LossOutput
from isthmus.model.qformer.qformer import QFormer


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

    def features(self, inputs: Stage2Inputs) -> Tensor:
        """Return the image features of the rows, encoding images where features are not given."""
        if inputs.image_BPD is not None:
            return inputs.image_BPD
        if inputs.images_BCHW is None:
            raise ModelError("stage 2 got neither images_BCHW nor image_BPD; give one of them")
        return self.encode(inputs.images_BCHW)

    def loss_and_backward(
        self,
        batch: Stage2Inputs,
        *,
        seed: int,
        step: int,
        micro_batch_size: int,
        communicator: Communicator,
        backward: Callable[[Tensor], None] | None,
    ) -> LossOutput:
        """Compute the loss of the global batch and call `backward` once per micro-batch.

        Every rank must bring the same number of rows. Over all calls and ranks the gradients add up to that of the
        global loss. The only randomness is dropout, which the caller seeds.

        Args:
            batch: This rank's rows.
            seed: Unused here; part of the stages' common signature.
            step: Unused here; part of the stages' common signature.
            micro_batch_size: Rows per forward pass.
            communicator: Sums over ranks.
            backward: None: no gradient.

        Raises:
            ModelError: shapes that do not fit, or a valid row without a target; raised on all ranks.
        """
        del seed, step
        _check_shapes(batch)
        labels_BT = batch.tokens["labels"].masked_fill(~batch.valid_B[:, None], IGNORED)
        targets_B = (labels_BT != IGNORED).sum(dim=1)
        untargeted = ((targets_B == 0) & batch.valid_B).sum()
        counts = communicator.all_reduce_sum(torch.stack([targets_B.sum(), untargeted, batch.valid_B.sum()]).double())
        num_targets, num_untargeted, num_valid = (int(x) for x in counts.tolist())
        if num_untargeted:
            raise ModelError(
                f"{num_untargeted} of {num_valid} valid rows have no target token: an empty caption, or a prompt that "
                "fills the text; mark such samples as holes (valid=False) or clean the captions"
            )
        tokens = {**batch.tokens, "labels": labels_BT}
        total = labels_BT.new_zeros((), dtype=torch.float64)
        aligned = not self.language.is_encoder_decoder
        for part in _micro_batches(batch, tokens, micro_batch_size, aligned=aligned):
            with torch.set_grad_enabled(backward is not None):
                loss = self.language(self.visual(self.features(part)), part.tokens) / max(num_targets, 1)
            if backward is not None:
                backward(loss)
            total += loss.detach().double()
        mean = communicator.all_reduce_sum(total).float()
        return LossOutput(
            total=mean,
            parts={"lm": mean},
            metrics={"target_tokens": mean.new_tensor(num_targets), "valid": mean.new_tensor(num_valid)},
        )


def _micro_batches(
    batch: Stage2Inputs, tokens: Mapping[str, Tensor], size: int, *, aligned: bool
) -> Iterator[Stage2Inputs]:
    """Cut the rows into micro-batches and each one's text to its longest row; one device-to-host copy for all.

    `aligned`: labels stand under the tokens (decoder only), so the last token of the longest row is only a target.
    """
    starts = range(0, batch.valid_B.shape[0], size)
    # Real tokens are at the front (right padding); holes count as empty.
    real = torch.stack([tokens["attention_mask"].sum(dim=1) * batch.valid_B, _last_label(tokens["labels"])])
    longest = torch.stack([real[:, i : i + size].amax(dim=1) for i in starts]).tolist()
    for i, (text, target) in zip(starts, longest, strict=True):
        rows = slice(i, i + size)
        width, target_width = max(text - aligned, 1), max(text if aligned else target, 1)
        yield Stage2Inputs(
            tokens={
                "input_ids": tokens["input_ids"][rows, :width],
                "attention_mask": tokens["attention_mask"][rows, :width],
                "labels": tokens["labels"][rows, :target_width],
            },
            valid_B=batch.valid_B[rows],
            rows_B=batch.rows_B[rows],
            images_BCHW=None if batch.images_BCHW is None else batch.images_BCHW[rows],
            image_BPD=None if batch.image_BPD is None else batch.image_BPD[rows],
        )


def _last_label(labels_BT: Tensor) -> Tensor:
    """Return for each row one more than the column of its last target; 0 where there is none."""
    columns_T = torch.arange(1, labels_BT.shape[1] + 1, device=labels_BT.device)
    return ((labels_BT != IGNORED) * columns_T).amax(dim=1)


def _check_shapes(batch: Stage2Inputs) -> None:
    num_rows = batch.valid_B.shape[0]
    image = batch.image_BPD if batch.image_BPD is not None else batch.images_BCHW
    sizes = {name: tensor.shape[0] for name, tensor in batch.tokens.items()}
    sizes |= {"rows": batch.rows_B.shape[0], "images": num_rows if image is None else image.shape[0]}
    wrong = {name: size for name, size in sizes.items() if size != num_rows}
    if wrong:
        raise ModelError(f"stage 2: valid_B has {num_rows} rows, but {wrong}; all inputs need one entry per row")
    ids, mask = batch.tokens["input_ids"], batch.tokens["attention_mask"]
    if ids.shape != mask.shape:
        raise ModelError(
            f"stage 2: input_ids are {tuple(ids.shape)}, attention_mask {tuple(mask.shape)}; make them equal"
        )
