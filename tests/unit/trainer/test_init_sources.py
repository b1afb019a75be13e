"""Stage 2 begins with whatever holds the trained tensors: checkpoints and exports of ours, transformers and LAVIS."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.model.formats.key_mapping import reference_name
from isthmus.trainer.errors import CheckpointError
from isthmus.trainer.runs import init_sources
from isthmus.trainer.runs.init_sources import open_source
from tests.saved_states import fragments_of, full, manager, state_of

pytestmark = pytest.mark.unit
NAMES = ("qformer.query_tokens", "qformer.layers.0.attention.query.weight", "qformer.layers.0.query_ffn.up.bias")
TRAINED = {name: torch.arange(12.0).view(3, 4) + number for number, name in enumerate(NAMES)}
NOT_TRAINED = {"language_model.big.weight": torch.zeros(1 << 16)}


def write_export(folder: Path) -> str:
    """Write what `export_bridge` does, as far as it is read."""
    folder.mkdir()
    save_file(TRAINED, folder / "bridge.safetensors")
    (folder / "bridge.json").write_text(json.dumps({"format": "isthmus-bridge-1"}))
    return str(folder)


def write_transformers(folder: Path) -> str:
    """Write a BLIP-2 folder in two files, as the paper's recipes export it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "blip-2"}))
    files = {"model-00001.safetensors": NOT_TRAINED, "model-00002.safetensors": TRAINED}
    weight_map = {}
    for file, tensors in files.items():
        theirs = {reference_name(name, "hf") if tensors is TRAINED else name: t for name, t in tensors.items()}
        save_file(theirs, folder / file)
        weight_map |= dict.fromkeys(theirs, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return str(folder)


def write_lavis(folder: Path) -> str:
    folder.mkdir()
    path = folder / "blip2_pretrained.pth"
    torch.save({"model": {reference_name(name, "lavis", "opt"): t for name, t in TRAINED.items()}}, path)
    return str(path)


@pytest.mark.parametrize("write", [write_export, write_transformers, write_lavis])
def test_every_format_holds_the_same_tensors(tmp_path, write):
    """The promise of stage2.init_from was kept for two of these formats only, not for the paper's own recipes."""
    url = write(tmp_path / "source")
    source = open_source(url, ObjectStore(), [*NAMES, "projection.weight"])
    assert source.url == url
    assert source.shapes() == {name: tuple(tensor.shape) for name, tensor in TRAINED.items()}
    for name, tensor in TRAINED.items():
        assert torch.equal(source.read_tensor(name), tensor)
    identity = source.identity()
    assert open_source(url, ObjectStore(), NAMES).identity() == identity


@pytest.mark.parametrize("write", [write_transformers, write_lavis])
def test_what_is_left_is_known_by_name_and_not_read(tmp_path, write):
    source = open_source(write(tmp_path / "source"), ObjectStore(), NAMES[:2])
    left = source.shapes().keys() - set(NAMES[:2])
    assert left == {reference_name(NAMES[2], "hf" if write is write_transformers else "lavis")}


def test_a_changed_source_has_another_identity(tmp_path):
    url = write_transformers(tmp_path / "source")
    before = open_source(url, ObjectStore(), NAMES).identity()
    changed = {reference_name(name, "hf"): tensor + 1 for name, tensor in TRAINED.items()}
    save_file(changed, tmp_path / "source/model-00002.safetensors")
    assert open_source(url, ObjectStore(), NAMES).identity() != before


def test_the_frozen_language_model_beside_the_tensors_is_not_read(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(
        init_sources, "_read", lambda entry, _store: read.append(entry.num_bytes) or torch.zeros(entry.shape)
    )
    open_source(write_transformers(tmp_path / "source"), ObjectStore(), NAMES)
    assert sum(read) == sum(tensor.nbytes for tensor in TRAINED.values())


def test_a_checkpoint_is_one_and_anything_else_is_refused(tmp_path):
    checkpoints = manager(str(tmp_path))
    checkpoints.save(3, fragments_of(3), state_of(3))
    checkpoints.wait()
    checkpoints.close()
    source = open_source(str(tmp_path / "step-000000003"), ObjectStore(), NAMES)
    assert torch.equal(source.read_tensor("qformer.a").flatten(), full(3)["qformer.a", "param"])
    with pytest.raises(CheckpointError, match=r"neither a checkpoint.*nor an export.*nor a \.pth"):
        open_source(str(tmp_path / "elsewhere"), ObjectStore(), NAMES)
    (tmp_path / "broken.pth").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"broken\.pth: cannot be read as a checkpoint of LAVIS"):
        open_source(str(tmp_path / "broken.pth"), ObjectStore(), NAMES)
