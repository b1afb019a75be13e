"""Stage 1: the Q-Former learns to see with contrast, matching and grounded generation (BLIP-2, section 3.2).

The loss belongs to the global batch. Contrast and negatives need the features of all rows, so a step has two halves:
features of every micro-batch, detached, give the global contrast with its gradient and the negatives; then each
micro-batch runs with gradients and continues backward from the contrast's (Gao et al., 2021, "Scaling deep contrastive
learning batch size under memory limited setup"). With one micro-batch the first half's graph is kept and nothing is
computed twice.

Letters: B rows of this rank, b rows of a micro-batch, Q queries, P patches, C feature width, T text tokens,
E projection width, M pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.model.config import Stage1LossConfig
from isthmus.model.errors import ModelError
from isthmus.model.frozen.vision import VisionEncoder
from isthmus.model.objectives.communicator import Exchange
from isthmus.model.objectives.losses import LossOutput, NegativeChooser, draw_negatives
from isthmus.model.objectives.stage1_step import Stage1Step
from isthmus.model.qformer.layers import ImageMemory
from isthmus.model.qformer.packing import TextRows
from isthmus.model.qformer.qformer import CausalStates, QFormer, QueryStates
from isthmus.model.qformer.tied_embedding import Words

Backward = Callable[[Tensor], None]


@dataclass(frozen=True)
class Stage1Inputs:
    """One rank's rows of a step: images or their features, and WordPiece tokens."""

    input_ids_BT: Tensor
    """int64, [CLS] first, right-padded."""
    attention_mask_BT: Tensor
    """1: a token, 0: padding."""
    valid_B: Tensor
    """bool; False: the row takes part in no loss, neither as anchor nor as candidate."""
    rows_B: Tensor
    """int64, row in the global batch."""
    image_ids_B: Tensor | None = None
    """int64; rows with equal ids show the same image. None: every row is its own image."""
    images_BCHW: Tensor | None = None
    """Float, normalised."""
    image_BPD: Tensor | None = None
    """Features of the vision encoder, instead of images."""

    def at(self, rows: Tensor | slice) -> "Stage1Inputs":
        """Return some of the rows."""
        values: dict[str, Any] = vars(self)
        return replace(self, **{name: value[rows] for name, value in values.items() if value is not None})


@dataclass(frozen=True)
class Encoded:
    """What the first half of a micro-batch leaves; with a graph if it was built with gradients."""

    memory: ImageMemory
    states: QueryStates
    image_BQE: Tensor
    """Unit vectors, at least fp32."""
    text_BE: Tensor
    """Unit vectors, at least fp32."""
    words: Words
    """For what else the micro-batch reads of the word embeddings."""
    written: CausalStates | None = None
    """Of a joint pass: what the language head reads; `states` then hold no memory."""


class Stage1Model(nn.Module):
    """Q-Former with the heads of contrast and matching; the vision encoder is frozen.

    Args:
        vision: frozen encoder; none: inputs bring features.
        qformer: with its text side.
        config: weights and options of the losses.
        choose_negatives: the product draws; tests of the reference take the hardest.
    """

    def __init__(
        self,
        vision: VisionEncoder | None,
        qformer: QFormer,
        config: Stage1LossConfig | None = None,
        choose_negatives: NegativeChooser = draw_negatives,
    ) -> None:
        super().__init__()
        if vision is not None and vision.width != qformer.image_width:
            raise ModelError(
                f"the vision encoder gives features of width {vision.width}, the Q-Former reads {qformer.image_width}"
            )
        self.config = config or Stage1LossConfig()
        self.choose_negatives = choose_negatives
        self.vision = vision
        self.qformer = qformer
        width = qformer.config.hidden_size
        self.image_projection = nn.Linear(width, qformer.config.projection_size)
        self.text_projection = nn.Linear(width, qformer.config.projection_size)
        self.itm_head = nn.Linear(width, 2)
        self.temperature = nn.Parameter(torch.tensor(self.config.temperature_init))

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Name what stage 1 optimises: everything but the vision encoder."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("vision.")}

    def features(self, inputs: Stage1Inputs) -> Tensor:
        """Return the frozen image features of the rows, encoding images where features are not given."""
        if inputs.image_BPD is not None:
            return inputs.image_BPD
        if self.vision is None or inputs.images_BCHW is None:
            raise ModelError(
                "stage 1 got neither features nor images with an encoder; give image_BPD, or images_BCHW and vision"
            )
        features: Tensor = self.vision(inputs.images_BCHW)
        return features

    def encode(self, image_BPC: Tensor, ids_BT: Tensor, mask_BT: Tensor, *, jointly: bool = False) -> Encoded:
        """Run the query pass and the text pass; images beyond the texts' number only get cross-attention memory.

        `jointly`: the causal pass too, all in one.
        """
        qformer, written = self.qformer, None
        memory, text, words = qformer.image_memory(image_BPC), qformer.list_tokens(ids_BT, mask_BT), qformer.words()
        if jointly:
            states, text_BD, written = qformer.joint_pass(text, memory, words)
        else:
            states, text_BD = qformer.query_pass(memory, len(ids_BT)), qformer.text_pass(text, words)
        image_BQE = _unit_vectors(self.image_projection(states.hidden_BQD))
        return Encoded(memory, states, image_BQE, _unit_vectors(self.text_projection(text_BD)), words, written)

    def match(self, text: TextRows, memory: ImageMemory, embedded_ND: Tensor | None = None) -> Tensor:
        """Return matching logits of M pairs (no match, match): text m and image `memory.index_B[m]`.

        `embedded_ND`: the Q-Former's `embed` of the text, where the caller has it.
        """
        hidden_MQD = self.qformer.multimodal_pass(text, memory, embedded_ND)
        logits_M2: Tensor = self.itm_head(hidden_MQD).mean(dim=1)
        return logits_M2

    def loss_and_backward(
        self,
        batch: Stage1Inputs,
        *,
        seed: int,
        step: int,
        micro_batch_size: int,
        exchange: Exchange,
        backward: Backward | None,
    ) -> LossOutput:
        """Compute the losses of the global batch and call `backward` once or twice per micro-batch. Collective.

        Every rank must bring the same number of rows. Over all calls and ranks the gradients add up to that of the
        global loss. Dropout masks and negatives depend on `seed`, `step` and the place in the batch alone; torch's
        global generators are reseeded where dropout is active.

        Args:
            batch: this rank's rows.
            seed: of the stage.
            step: optimizer step.
            micro_batch_size: rows that hold activations at a time.
            exchange: communication with the other ranks of the global batch.
            backward: None: no gradient.

        Raises:
            ModelError: inputs that do not fit the model.
        """
        _check_shapes(batch)
        starts = range(0, batch.valid_B.shape[0], micro_batch_size)
        parts = [part.at(part.valid_B) for part in (batch.at(slice(i, i + micro_batch_size)) for i in starts)]
        return Stage1Step(self, exchange, seed, step, backward).run(parts)


def _unit_vectors(x: Tensor) -> Tensor:
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def _check_shapes(batch: Stage1Inputs) -> None:
    num_rows = batch.valid_B.shape[0]
    images = batch.images_BCHW if batch.image_BPD is None else batch.image_BPD
    sizes = {
        "input_ids_BT": batch.input_ids_BT,
        "attention_mask_BT": batch.attention_mask_BT,
        "rows_B": batch.rows_B,
        "images": images,
        "image_ids_B": batch.image_ids_B,
    }
    wrong = {name: len(x) for name, x in sizes.items() if x is not None and len(x) != num_rows}
    if wrong:
        raise ModelError(f"stage 1: valid_B has {num_rows} rows, but {wrong}; all inputs need one entry per row")
    if batch.input_ids_BT.shape != batch.attention_mask_BT.shape:
        raise ModelError(
            f"stage 1: input_ids are {tuple(batch.input_ids_BT.shape)}, attention_mask "
            f"{tuple(batch.attention_mask_BT.shape)}; make them equal"
        )
    empty = int(((batch.attention_mask_BT[:, 0] == 0) & batch.valid_B).sum())
    if empty:
        raise ModelError(
            f"stage 1: {empty} valid rows have no token at all; texts are right-padded and begin with [CLS]"
        )
