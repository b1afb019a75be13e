"""Seeds of everything random in training, as functions of the place in the run."""

import hashlib


def derive_seed(*place: int | str) -> int:
    """Return a 63-bit seed that depends on every part of the place and on their order."""
    text = "/".join(f"{type(part).__name__}:{part}" for part in place)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stage_seed(run_seed: int, stage: str) -> int:
    """Return the seed that a stage's model functions get; they add the step and the row."""
    return derive_seed("stage", run_seed, stage)
