"""The page for people who come from LAVIS: every statement has a test, every setting is a key."""

import re
from pathlib import Path
from typing import Any

import pytest

from isthmus.cluster.config import JobConfig
from isthmus.model.formats.key_mapping import reference_name

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "migrating-from-lavis.md").read_text()


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_statement_names_a_test_that_exists():
    statements = [line for line in section("Weights").splitlines() if line.startswith("| ") and "`tests/" in line]
    statements += [*section("Intentional differences").split("\n- ")[1:], section("What is the same")]
    assert len(statements) > 12
    named = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
    assert [statement for statement in statements if not named.search(statement)] == []
    for path, name in named.findall(PAGE):
        assert f"def {name}(" in (ROOT / path).read_text(), f"{path}::{name}"


def test_every_setting_is_a_key_of_the_schema():
    schema = JobConfig.model_json_schema()
    rows = [row.split("|")[2] for row in section("Settings").splitlines() if row.startswith("| `")]
    keys = [key for row in rows for key in re.findall(r"`([\w.]+\.[\w.]+)`", row)]
    assert len(keys) > 12
    for key in keys:
        stages = ("stage1", "stage2") if key.startswith("stageN") else ("",)
        for stage in stages:
            assert_key(schema, schema, key.replace("stageN", stage))


def assert_key(schema: dict[str, Any], node: dict[str, Any], key: str) -> None:
    for part in key.split("."):
        node = resolved(schema, node)
        assert part in node["properties"], key
        node = node["properties"][part]


def resolved(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    """Follow a reference to a section, which may be optional."""
    for option in (node, *node.get("anyOf", ()), *node.get("allOf", ())):
        if "$ref" in option:
            found: dict[str, Any] = schema["$defs"][option["$ref"].rpartition("/")[2]]
            return found
    return node


@pytest.mark.parametrize(
    ("lavis", "ours", "leaf"),
    [
        ("Qformer.bert.encoder.layer.3.intermediate_query.dense", "qformer.layers.3.query_ffn.up", ".weight"),
        ("Qformer.bert.encoder.layer.3.output.dense", "qformer.layers.3.text_ffn.down", ".bias"),
        ("query_tokens", "qformer.query_tokens", ""),
        ("ln_vision", "qformer.ln_vision", ".weight"),
        ("vision_proj", "image_projection", ".weight"),
        ("temp", "temperature", ""),
        ("opt_proj", "projection", ".bias"),
    ],
)
def test_the_table_of_names_is_the_mapping(lavis, ours, leaf):
    assert reference_name(ours + leaf, "lavis") == lavis + leaf
    named = re.sub(r"\.\d+\.", ".N.", ours).removesuffix(".up").removesuffix(".down")
    assert f"`{named}`" in section("Weights")
