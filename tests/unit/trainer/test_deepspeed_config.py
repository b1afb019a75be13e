"""Templates of DeepSpeed: those that ship load, others are refused with what to change."""

import json
from pathlib import Path

import pytest

from isthmus.trainer.engine.deepspeed_config import TEMPLATES, frozen_config, trainable_config
from isthmus.trainer.errors import ConfigError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("name", sorted(path.stem for path in TEMPLATES.glob("*.json")))
def test_shipped_templates_load(name: str) -> None:
    """Each section says the stage that it has, and only a template with a frozen section says zero3."""
    sections = json.loads((TEMPLATES / f"{name}.json").read_text())
    assert ("zero3" in name) == ("frozen" in sections)
    assert trainable_config(name)["zero_optimization"].items() >= sections["trainable"]["zero_optimization"].items()
    assert frozen_config(name)["zero_optimization"]["stage"] == 3
    assert sections.get("frozen", {"zero_optimization": {"stage": 3}})["zero_optimization"]["stage"] == 3
    # ClippedAdamW clips; DeepSpeed's default of 1.0 would clip twice
    assert trainable_config(name)["gradient_clipping"] == frozen_config(name)["gradient_clipping"] == 0.0


def test_a_file_in_deepspeeds_own_form_is_read_as_both_sections(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "stage3_prefetch_bucket_size": 7}}))
    assert trainable_config(str(path))["zero_optimization"]["stage"] == 2
    frozen = frozen_config(str(path))["zero_optimization"]
    assert (frozen["stage"], frozen["stage3_prefetch_bucket_size"]) == (3, 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        (json.dumps({"zero_optimization": {"stage": 0}}), "use 1"),
        (json.dumps({}), "stage = None"),
        (json.dumps({"trainable": {"zero_optimization": {"stage": 1}}, "zero_optimization": {}}), "move it into"),
        (json.dumps({"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}), "sets bf16"),
        (json.dumps({"zero_optimization": {"stage": 1}, "train_batch_size": 8, "optimizer": {}}), "remove them"),
    ],
)
def test_bad_templates_say_what_to_change(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "template.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        trainable_config(str(path))


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="stage1_zero1"):
        trainable_config("stage9")
