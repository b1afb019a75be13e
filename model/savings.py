"""Which exact savings the Q-Former's passes use; all of them unless a test compares with the plain path."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Savings:
    """Work left out without changing the mathematics; each one can be switched off to show that."""

    share_image_keys_values: bool = True
    """Cross-attention keys and values once per image and layer, indexed by the pairs of image-text matching."""
    pack_text: bool = True
    """Text layers see real tokens only, not the padding."""
    target_logits_only: bool = True
    """Vocabulary logits only at positions that have a target."""
    prune_last_layer: bool = True
    """The last layer computes only rows that are read afterwards."""
    fold_image_norm: bool = True
    """The affine part of ln_vision goes into the key and value weights, so image features need no gradient."""
    recompute_gelu: bool = True
    """Memory instead of work: the feed-forward networks keep their widest activation once. Not under autocast."""
    match_backward_first: bool = True
    """Memory: matching runs backward by itself, and its activations are freed before most gradients exist."""


PLAIN = Savings(
    share_image_keys_values=False,
    pack_text=False,
    target_logits_only=False,
    prune_last_layer=False,
    fold_image_norm=False,
    recompute_gelu=False,
    match_backward_first=False,
)
