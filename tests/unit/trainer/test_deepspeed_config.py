"""Templates of DeepSpeed: those that ship load, others are refused with what to change."""

import json
from pathlib import Path

import pytest

from isthmus.trainer.engine.deepspeed_config import TEMPLATES, load_template
from isthmus.trainer.errors import ConfigError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("name", sorted(path.stem for path in TEMPLATES.glob("*.json")))
def test_shipped_templates_load(name: str) -> None:
    config = load_template(name)
    assert config["zero_optimization"]["stage"] in (1, 2, 3)
    assert config["gradient_clipping"] == 0.0  # ClippedAdamW clips; DeepSpeed's default of 1.0 would clip twice


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        (json.dumps({"zero_optimization": {"stage": 0}}), "use 1"),
        (json.dumps({}), "stage = None"),
        (json.dumps({"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}), "sets bf16"),
        (json.dumps({"zero_optimization": {"stage": 1}, "train_batch_size": 8, "optimizer": {}}), "remove them"),
    ],
)
def test_bad_templates_say_what_to_change(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "template.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_template(str(path))


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="stage1_zero1"):
        load_template("stage9")
