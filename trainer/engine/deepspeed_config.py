"""DeepSpeed's configurations: the two sections of a template, completed with the values of the run configuration.

A template holds `trainable`, for the part that the stage optimises (ZeRO-1, 2 or 3), and `frozen`, for the language
model (always ZeRO-3). A file in DeepSpeed's own form, with `zero_optimization` at the top, is read as both: its stage
is that of the trainable part.
"""

import json
from pathlib import Path
from typing import Any

from isthmus.trainer.errors import ConfigError

TEMPLATES = Path(__file__).parents[2] / "ds_configs"
SECTIONS = ("trainable", "frozen")
_OWNED_BY_RUN = (
    "bf16", "fp16", "gradient_accumulation_steps", "gradient_clipping", "optimizer", "scheduler",
    "torch_autocast", "train_batch_size", "train_micro_batch_size_per_gpu",
)  # fmt: skip
_COMMON = {
    # Micro-batches are the task's business: to DeepSpeed a step is one batch of unknown size.
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,  # its default is 1.0; ClippedAdamW clips
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "steps_per_print": 1_000_000_000,
}


def trainable_config(template: str | dict[str, Any]) -> dict[str, Any]:
    """Return DeepSpeed's configuration of the trainable part, from a template's name, path or content.

    Raises:
        ConfigError: no such template, not JSON, a stage other than 1, 2, 3, or a key that the run configuration owns.
    """
    section = _read_section(template, "trainable")
    stage = section.get("zero_optimization", {}).get("stage")
    if stage not in (1, 2, 3):
        raise ConfigError(
            f"deepspeed: {_named(template)} has zero_optimization.stage = {stage} for the trainable part; "
            "use 1 (also on one GPU), 2 or 3"
        )
    return _COMMON | section


def frozen_config(template: str | dict[str, Any]) -> dict[str, Any]:
    """Return DeepSpeed's configuration of the frozen language model, whose parameters keep their own type.

    Raises:
        ConfigError: as `trainable_config`, or the template asks for something that frozen parameters cannot have.
    """
    section = _read_section(template, "frozen")
    zero = section.get("zero_optimization", {}) | {"stage": 3, "memory_efficient_linear": False}
    zero.pop("offload_optimizer", None)
    if zero.get("zero_quantized_nontrainable_weights"):
        raise ConfigError(
            "deepspeed: zero_quantized_nontrainable_weights needs an engine with an optimizer over the frozen "
            "parameters; remove it (zero_quantized_weights quantises the gathers)"
        )
    if zero.get("offload_param", {}).get("device") == "nvme":
        raise ConfigError("deepspeed: offload_param.device nvme is not supported for frozen weights; use cpu")
    return _COMMON | section | {"zero_optimization": zero}


def _read_section(template: str | dict[str, Any], name: str) -> dict[str, Any]:
    content, source = _read(template), _named(template)
    sections = content if any(key in content for key in SECTIONS) else dict.fromkeys(SECTIONS, content)
    unknown = [key for key in sections if key not in SECTIONS]
    if unknown:
        raise ConfigError(
            f"deepspeed: {source} has {', '.join(unknown)} beside {' and '.join(SECTIONS)}; move it into one of them"
        )
    section: dict[str, Any] = sections.get(name, {})
    owned = [key for key in _OWNED_BY_RUN if key in section]
    if owned:
        raise ConfigError(f"deepspeed: {source} sets {', '.join(owned)}; remove them: the run configuration has them")
    return section


def _read(template: str | dict[str, Any]) -> dict[str, Any]:
    if isinstance(template, dict):
        return template
    path = Path(template) if template.endswith(".json") else TEMPLATES / f"{template}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in TEMPLATES.glob("*.json")))
        raise ConfigError(
            f"deepspeed: no template {template!r} at {path}; use one of {known}, or the path of a .json file"
        )
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"deepspeed: {path} is not JSON: {error}") from error
    return content


def _named(template: str | dict[str, Any]) -> str:
    return template if isinstance(template, str) else "the template"
