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
    """Generation has rows and vocabulary logits for tokens before another only: the last one is just a target."""
    prune_last_layer: bool = True
    """The last layer computes only rows that are read afterwards."""
    fold_image_norm: bool = True
    """The affine part of ln_vision goes into the key and value weights, so image features need no gradient."""
    share_first_queries: bool = True
    """While dropout is off all rows begin with the same queries, which the first layer then projects once."""
    match_mutual_once: bool = True
    """While dropout is off, an image and a text that are each other's negatives are matched once, not twice."""
    join_passes: bool = True
    """Contrast and generation in one pass, where a step is one micro-batch: each weight's gradient is written once."""
    chain_words: bool = True
    """Looking up tokens adds to the language head's gradient of the word embeddings and makes none of its own."""
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
    share_first_queries=False,
    match_mutual_once=False,
    join_passes=False,
    chain_words=False,
    recompute_gelu=False,
    match_backward_first=False,
)
