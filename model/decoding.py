"""Decoding settings of the language model; without torch, so that configuration and driver import it cheaply."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Decoding:
    """How text is chosen; the defaults are the original's for captions."""

    max_new_tokens: int = 30
    """Longest generated text, in tokens."""
    num_beams: int = 5
    """Beams; 1: greedy, or sampling."""
    sample: bool = False
    """Draw tokens instead of taking the best."""
    temperature: float = 1.0
    """Divisor of the logits when sampling."""
    top_p: float = 0.9
    """Smallest probability mass from which is sampled."""
    length_penalty: float = 1.0
    """Exponent of the length by which a beam's score is divided; negative favours short texts."""
    seed: int = 0
    """Seed of sampling."""
    min_length: int = 0
    """Shortest text, in tokens, counted as the original counts: with a decoder's prompt, with T5's start token."""

    def min_new_tokens(self, num_given_tokens: int) -> int | None:
        """Return how many tokens a text has at least after those that are given; None means any number."""
        return max(0, self.min_length - num_given_tokens) or None
