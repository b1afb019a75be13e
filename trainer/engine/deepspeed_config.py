"""DeepSpeed's configuration: a template from ds_configs/ plus what the run configuration decides."""

import json
from pathlib import Path
from typing import Any

from isthmus.trainer.errors import ConfigError

TEMPLATES = Path(__file__).parents[2] / "ds_configs"
_FROM_RUN = (
    "bf16", "fp16", "gradient_accumulation_steps", "gradient_clipping", "optimizer", "scheduler",
    "torch_autocast", "train_batch_size", "train_micro_batch_size_per_gpu",
)  # fmt: skip


def load_template(template: str | dict[str, Any]) -> dict[str, Any]:
    """Return a template, given by name, path or content, completed for the trainable part.

    Its `zero_optimization.stage` is that of the trainable part. A frozen language model is always under ZeRO-3.

    Raises:
        ConfigError: no such template, not JSON, a stage other than 1, 2, 3, or a key that the run configuration owns.
    """
    if isinstance(template, dict):
        return _completed(template, "the template")
    path = Path(template) if template.endswith(".json") else TEMPLATES / f"{template}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in TEMPLATES.glob("*.json")))
        raise ConfigError(
            f"deepspeed: no template {template!r} at {path}; use one of {known}, or the path of a .json file"
        )
    try:
        return _completed(json.loads(path.read_text()), str(path))
    except json.JSONDecodeError as error:
        raise ConfigError(f"deepspeed: {path} is not JSON: {error}") from error


def _completed(template: dict[str, Any], source: str) -> dict[str, Any]:
    owned = [key for key in _FROM_RUN if key in template]
    if owned:
        raise ConfigError(f"deepspeed: {source} sets {', '.join(owned)}; remove them: the run configuration has them")
    stage = template.get("zero_optimization", {}).get("stage")
    if stage not in (1, 2, 3):
        raise ConfigError(f"deepspeed: {source} has zero_optimization.stage = {stage}; use 1 (also on one GPU), 2 or 3")
    return _MECHANICS | template


_MECHANICS = {
    # Micro-batches are the task's business: to DeepSpeed a step is one batch of unknown size.
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,  # its default is 1.0; ClippedAdamW clips
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "steps_per_print": 1_000_000_000,
}
