"""Which keys of a run's configuration may change between two starts."""

from collections.abc import Sequence
from typing import Any

from isthmus.model.config import STORAGE_TYPES
from isthmus.trainer.config.loading import Change, diff_configs
from isthmus.trainer.errors import ConfigError

FREE = (
    "checkpoint",
    "cluster",
    "data.backend",
    "data.budget",
    "data.cache_bytes",
    "data.cache_dir",
    "data.prefetch_bytes",
    "data.prefetch_steps",
    "data.reader_resources",
    "data.reader_timeout_seconds",
    "data.readers",
    "evaluation",
    "logging",
    "model.compile",
    "run.export",
    "run.url",
    "safety",
    "stage1.deepspeed",
    "stage1.micro_batch_size",
    "stage2.deepspeed",
    "stage2.micro_batch_size",
    "store",
)
"""Keys, with all below them, that do not change what is trained."""
ALLOWABLE = ("data.crop_scale", "data.flip", "data.max_caption_words", "data.max_image_pixels", "stage1", "stage2")
"""Keys that change what is trained but leave the state usable: with --allow-change. Batch size and the rest never."""
NEVER = ("stage1.global_batch_size", "stage2.global_batch_size")


def check_changes(old: dict[str, Any], new: dict[str, Any], allowed: Sequence[str], url: str) -> list[Change]:
    """Compare a run's stored configuration with the one of this start; return what changed.

    Args:
        old: As stored.
        new: As resolved now.
        allowed: Keys given by --allow-change; each covers all keys below it.
        url: Where the stored one is, for the message.

    Raises:
        ConfigError: something changed that must not, or may only when allowed; lists every such key.
    """
    changes = diff_configs(_with_frozen_types(old), _with_frozen_types(new))
    fixed = [change for change in changes if not _covered(change.key, FREE)]
    refused = [change for change in fixed if not (_allowable(change.key) and _covered(change.key, allowed))]
    if refused:
        lines = [f"  {change.key}: {change.old!r} -> {change.new!r}{_advice(change.key)}" for change in refused]
        raise ConfigError(
            f"{url}: this run was started with another configuration:\n"
            + "\n".join(lines)
            + "\nrestore these values, or give the new run another run.name"
        )
    return changes


def _with_frozen_types(config: dict[str, Any]) -> dict[str, Any]:
    """Return the plain data with `auto` types of frozen parts replaced, where all stages resolve them alike."""
    precisions = {name: stage["precision"] for name in ("stage1", "stage2") if (stage := config.get(name))}
    model = dict(config.get("model") or {})
    for part, stages in (("vision", ("stage1", "stage2")), ("language", ("stage2",))):
        types = {STORAGE_TYPES[precisions[name]] for name in stages if name in precisions}
        if (model.get(part) or {}).get("dtype") == "auto" and len(types) == 1:
            model[part] = {**model[part], "dtype": types.pop()}
    return {**config, "model": model}


def _allowable(key: str) -> bool:
    return _covered(key, ALLOWABLE) and not _covered(key, NEVER)


def _advice(key: str) -> str:
    return f"   (possible with --allow-change {key})" if _allowable(key) else ""


def _covered(key: str, prefixes: Sequence[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)
