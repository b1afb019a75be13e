"""The pages that specify files: their tables are what the code writes and reads, their script reads a checkpoint."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from isthmus.bootstrap.duplicates import hashes, marks
from isthmus.data_pipeline.dataset import shard_check, shard_index
from isthmus.data_pipeline.dataset.manifest import LayerRef, Manifest, Shard
from isthmus.data_pipeline.ingest import records
from isthmus.data_pipeline.layers import candidates, layered_manifest
from isthmus.data_pipeline.layers.layer import Layer, LayerFile
from isthmus.data_pipeline.sample.image_formats import IMAGE_EXTENSIONS
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.model.formats import native
from isthmus.trainer.checkpoint.format import FileEntry
from isthmus.trainer.checkpoint.format import Manifest as CheckpointManifest
from isthmus.trainer.checkpoint.train_state import TrainState
from isthmus.trainer.errors import CheckpointError
from tests.saved_states import SHAPES, fragments_of, full, manager, state_of

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]
DATA = (ROOT / "docs" / "data-format.md").read_text()
CHECKPOINT = (ROOT / "docs" / "checkpoint-format.md").read_text()


def table_after(page: str, text: str) -> list[list[str]]:
    """Return the cells of the first table after a text, without the heading."""
    lines = page.split(text, 1)[1].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:] if line.startswith("|")]
    length = next((n for n, line in enumerate(lines[start:]) if not line.startswith("|")), len(rows))
    return rows[2:length]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def fields(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def test_extensions_and_columns():
    assert names(table_after(DATA, "## Shards")[0][0])[0].split() == list(IMAGE_EXTENSIONS)
    in_rows = [names(row[2])[0] for row in table_after(DATA, "## Captions and images")]
    assert in_rows == list(records._CAPTION_COLUMNS)
    assert "`path`, `url`, `image`, `file_name`, `image_path`, `image_url`" in DATA
    assert records._LOCATION_COLUMNS == ("path", "url", "image", "file_name", "image_path", "image_url")


def test_faults_and_their_policy():
    rows = table_after(DATA, "## Faults")
    policy = {name: row[2] for row in rows for name in names(row[0])}
    assert policy == dict(shard_check.DEFAULT_POLICY)


def test_every_cause_of_a_bad_sample_is_described():
    sources = "".join(path.read_text() for path in (ROOT / "data_pipeline").rglob("*.py"))
    causes = set(re.findall(r'BadSample\(\s*"(\w+)"', sources))
    assert len(causes) > 12
    assert [cause for cause in sorted(causes) if f"`{cause}`" not in DATA] == []


def test_the_manifest():
    header = table_after(DATA, "## Manifest")[0][1]
    dropped = {row[0]: names(row[1]) for row in table_after(DATA, "## Manifest")}["`dropped.jsonl`"]
    assert dropped == ["shard", *shard_check.Drop._fields]
    layer = LayerRef("u", "h", "b", "bh")
    shard = Shard("s3://b/a.tar", 1, "e", 1, "s3://b/m/indexes/a.idx", "i", "s3://b/m/captions/a.parquet", "c")
    store = ObjectStore()
    written: dict[str, bytes] = {}
    store.put = lambda url, data: written.update({url: bytes(data)})  # type: ignore[method-assign, assignment]
    Manifest([shard], [np.array([1])], 5, layer).save("s3://b/m", store)
    lines = written["s3://b/m/manifest.jsonl"].decode().splitlines()
    first, line = (set(re.findall(r'"(\w+)": ', text)) for text in lines)
    assert first == {*names(header), *fields(LayerRef), "layer"}
    described = DATA.split("A shard's line has ")[1].split("A chunk is")[0]
    more = DATA.split("A shard's line has two more fields:")[1].split(". Its index")[0]
    assert line == {*names(described), *names(more)}


def test_the_index():
    parts = [names(row[0])[0] for row in table_after(DATA, "## Shard index") if row[0].startswith("`")]
    assert parts == [name for name, _, _ in shard_index._ARRAYS]
    types = {names(row[0])[0]: row[1] for row in table_after(DATA, "## Shard index") if row[0].startswith("`")}
    for name, kind, size in shard_index._ARRAYS:
        letter = {"samples": "S", "members": "M", "chunks": "C"}[size]
        assert types[name].startswith(f"{kind.removeprefix('<')} x {letter}"), name
    assert f"`{shard_index.MAGIC.decode()}`" in DATA


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("covers the layer's hash and the captions", layered_manifest._SCHEMA.names),
        ("A **caption layer** has", ["key", *candidates._LISTS, f"{candidates.SCORE_PREFIX}NAME"]),
        ("the latter the key and the last three:", [*hashes.SCHEMA.names, *marks.SCHEMA.names[1:]]),
    ],
)
def test_columns_of_layers(text, columns):
    assert [names(row[0])[0] for row in table_after(DATA, text)] == columns


def test_records_of_layers():
    rows = {row[0]: row[1] for row in table_after(DATA, "## Layers")}
    layer = Layer("f", "b", None, {}, [], ObjectStore())
    keys = set(re.findall(rb'^ "(\w+)":', layer.to_bytes(), re.MULTILINE))
    assert {key.encode() for key in names(rows["`layer.json`"])} == keys
    assert set(names(rows["`tables/NNNNNN-SHARD.json`"])) == {*fields(LayerFile), "made_by"}


def test_the_keys_of_a_checkpoint():
    keys = [name for row in table_after(CHECKPOINT, "## MANIFEST.json") for name in names(row[0])]
    assert keys == ["format", "version", *fields(CheckpointManifest)]
    assert f"`{{{', '.join(fields(FileEntry))}}}`" in CHECKPOINT
    assert f"`{{{', '.join(fields(TrainState))}}}`" in CHECKPOINT
    raw = state_of(1).as_json()
    needed = {name: raw[name] for name in fields(TrainState)[:4]}
    assert TrainState.from_json(needed, "state") == state_of(1), "the page says that a reader needs the first four"
    for name in needed:
        with pytest.raises(CheckpointError, match=f"lacks {name}"):
            TrainState.from_json({key: value for key, value in raw.items() if key != name}, "state")


def test_the_documented_script_reads_a_checkpoint(tmp_path, monkeypatch):
    checkpoints = manager(str(tmp_path))
    checkpoints.save(1200, [*fragments_of(1200, 0, 2), *fragments_of(1200, 1, 2)], state_of(1200))
    checkpoints.wait()
    checkpoints.close()
    monkeypatch.chdir(tmp_path)
    (script,) = re.findall(r"```python\n(.*?)```", CHECKPOINT, re.DOTALL)
    found: dict[str, object] = {}
    exec(compile(script, "checkpoint-format.md", "exec"), found)
    assert {name: tuple(shape) for name, shape in found["shapes"].items()} == SHAPES
    assert found["tensors"].keys() == full(1200).keys()
    for key, tensor in full(1200).items():
        assert (found["tensors"][key] == tensor.numpy()).all(), key


def test_the_native_export():
    page = (ROOT / "docs" / "export-format.md").read_text()
    assert f"version `{native.FORMAT}`" in page
    layout = page.split("## Native format")[1].split("```")[1]
    assert {native.DESCRIPTION, native.WEIGHTS, "vision/", "language/", "tokenizer/"} == set(
        re.findall(r"\b(?:bridge\.\w+|vision/|language/|tokenizer/)", layout)
    )
