"""The identity of frozen weights depends on names, types, shapes and bytes, and on nothing else."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.trainer.errors import TrainerError
from isthmus.trainer.frozen import identity as module
from isthmus.trainer.frozen.identity import FrozenGuard, frozen_identity

pytestmark = pytest.mark.unit


def identity_of(folder: Path, files: dict[str, dict[str, Tensor]]) -> str:
    folder.mkdir()
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
    return frozen_identity(str(folder), ObjectStore())


def test_files_do_not_matter_and_contents_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 64)  # several blocks per tensor
    torch.manual_seed(0)
    a, b = torch.randn(10, 10), torch.randn(7)
    base = identity_of(tmp_path / "base", {"one": {"a": a, "b": b}})
    assert identity_of(tmp_path / "split", {"x": {"b": b}, "y": {"a": a}}) == base
    changed = a.clone()
    changed[9, 9] += 1e-6
    others = {
        "byte": {"a": changed, "b": b},
        "name": {"c": a, "b": b},
        "shape": {"a": a.reshape(100), "b": b},
        "type": {"a": a, "b": b.view(torch.int32)},
        "missing": {"a": a},
    }
    found = {identity_of(tmp_path / name, {"one": tensors}) for name, tensors in others.items()}
    assert len(found | {base}) == 1 + len(others)


def test_guard_names_what_changed_and_ignores_trainable_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 3).requires_grad_(requires_grad=False), nn.Linear(3, 3))
    guard = FrozenGuard(model)
    with torch.no_grad():
        model[1].weight += 1
    guard.check()
    with torch.no_grad():
        model[0].bias[1] += 1e-7
        model[0].bias[0] = -model[0].bias[0]
    with pytest.raises(TrainerError, match=r"0\.bias"):
        guard.check()
