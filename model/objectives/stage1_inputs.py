"""What one rank brings to a step of stage 1."""

from dataclasses import dataclass, replace

from torch import Tensor

from isthmus.model.errors import ModelError
from isthmus.model.qformer.packing import PackedCaptions, pack_micro_batches


@dataclass(frozen=True)
class Stage1Inputs:
    """One rank's rows of a step: images or their features, and WordPiece tokens."""

    input_ids_BT: Tensor
    """int64, [CLS] first, right-padded; the same width on all ranks."""
    attention_mask_BT: Tensor
    """1: a token, 0: padding."""
    valid_B: Tensor
    """bool; False: a hole, which takes part in no loss, neither as anchor nor as candidate."""
    rows_B: Tensor
    """int64, row in the global batch."""
    image_ids_B: Tensor | None = None
    """int64; rows with equal ids show the same image. None: every row is its own image."""
    images_BCHW: Tensor | None = None
    """Float, normalised."""
    image_BPD: Tensor | None = None
    """Features of the vision encoder, instead of images."""
    texts: tuple[PackedCaptions, ...] | None = None
    """`pack_micro_batches` of the host's tokens. None: packed in the step, which then waits for the device."""

    def at(self, rows: Tensor | slice) -> "Stage1Inputs":
        """Return some of the rows."""
        tensors = {name: x[rows] for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **tensors, texts=None)

    def packed(self, micro_batch_size: int, max_positions: int = 512) -> "Stage1Inputs":
        """Return the same rows with `texts`, made from a host copy of the tokens unless they are there.

        Raises:
            ModelError: tensors do not belong together, a valid row has no token, or one has too many.
        """
        self._check_shapes()
        texts = self.texts
        if not texts or texts[0].batch != min(micro_batch_size, len(self.valid_B)):
            tokens = (self.input_ids_BT.cpu(), self.attention_mask_BT.cpu(), self.valid_B.cpu())
            packed = pack_micro_batches(*tokens, micro_batch_size)
            texts = tuple(text.to(self.valid_B.device) for text in packed)
        longest = max(text.length for text in texts)
        if longest > max_positions:
            raise ModelError(
                f"text has {longest} tokens, the Q-Former has {max_positions} positions; "
                "lower max_text_tokens or raise qformer.max_positions"
            )
        return replace(self, texts=texts)

    def _check_shapes(self) -> None:
        num_rows = self.valid_B.shape[0]
        wrong = {n: len(x) for n, x in vars(self).items() if isinstance(x, Tensor) and len(x) != num_rows}
        if wrong:
            raise ModelError(f"stage 1: valid_B has {num_rows} rows, but {wrong}; all inputs need one entry per row")
        ids, mask = self.input_ids_BT, self.attention_mask_BT
        if ids.shape != mask.shape:
            raise ModelError(
                f"stage 1: input_ids are {tuple(ids.shape)}, attention_mask {tuple(mask.shape)}; make them equal"
            )
