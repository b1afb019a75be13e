"""The identity of frozen weights depends on names, types, shapes and bytes, and on nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from isthmus.data_pipeline.store.object_store import ObjectInfo, ObjectStore
from isthmus.trainer.context import Rank
from isthmus.trainer.errors import CheckpointError, TrainerError
from isthmus.trainer.frozen import identity as module
from isthmus.trainer.frozen.identity import FrozenGuard, frozen_identity, text_files, text_identity
from isthmus.trainer.runs import identities
from isthmus.trainer.runs.identities import frozen_identities
from isthmus.trainer.trainer import check_same_inputs
from tests.saved_states import state_of
from tests.unit.trainer.test_run_store import config, open_run

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


def test_guard_covers_buffers() -> None:
    """A frozen encoder in train mode would change the statistics of its normalisation, and every feature with them."""
    model = nn.Sequential(nn.BatchNorm1d(3).requires_grad_(requires_grad=False), nn.Linear(3, 3))
    guard = FrozenGuard(model)
    model(torch.randn(4, 3))
    with pytest.raises(TrainerError, match="running_mean"):
        guard.check()


def write_texts(folder: Path, **files: str) -> str:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    store = ObjectStore()
    return text_identity(text_files(str(folder), store), store)


def test_configuration_and_tokenizer_have_an_identity(tmp_path: Path) -> None:
    base = write_texts(tmp_path / "a", config__json='{"act": "gelu", "eps": 1e-6}', tokenizer__json="1")
    resaved = '{"eps": 1e-6, "act": "gelu", "transformers_version": "5.23"}'
    assert write_texts(tmp_path / "b", config__json=resaved, tokenizer__json="1", README__md="text") == base
    others = {
        write_texts(tmp_path / "c", config__json='{"act": "gelu_new", "eps": 1e-6}', tokenizer__json="1"),
        write_texts(tmp_path / "d", config__json='{"act": "gelu", "eps": 1e-6}', tokenizer__json="2"),
        write_texts(tmp_path / "e", config__json='{"act": "gelu", "eps": 1e-6}'),
        write_texts(tmp_path / "f", config__json="damaged", tokenizer__json="1"),
    }
    assert len(others | {base}) == 5


def test_files_are_hashed_once_and_again_only_when_one_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart of a large model would otherwise read every byte of it twice, and a configuration by many requests."""
    hashed: list[str] = []
    whole, texts = identities.frozen_identity, identities.text_identity

    def count(url: str, *args: Any) -> str:
        hashed.append(url)
        return whole(url, *args)

    def count_texts(files: list[ObjectInfo], *args: Any) -> str:
        hashed.extend(info.url for info in files)
        return texts(files, *args)

    monkeypatch.setattr(identities, "frozen_identity", count)
    monkeypatch.setattr(identities, "text_identity", count_texts)
    folder, store = tmp_path / "vision", ObjectStore()
    folder.mkdir()
    save_file({"a": torch.zeros(3)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    run = open_run(tmp_path / "runs")
    setup = config(tmp_path / "runs", model__vision__path=str(folder), model__qformer__tokenizer=str(tmp_path / "bert"))
    first, second = (frozen_identities(setup, "stage1", run, store, Rank(0, 1)) for _ in range(2))
    assert first == second
    assert sorted(first) == ["qformer config and tokenizer", "vision", "vision config and tokenizer"]
    assert first["vision"] == whole(str(folder), store)
    assert hashed == [str(folder), str(folder / "config.json")]
    save_file({"a": torch.ones(3)}, folder / "model.safetensors")
    assert frozen_identities(setup, "stage1", run, store, Rank(0, 1))["vision"] != first["vision"]
    assert hashed[2:] == [str(folder)]
    (folder / "config.json").write_text('{"act": "gelu"}')
    third = frozen_identities(setup, "stage1", run, store, Rank(0, 1))
    assert third["vision config and tokenizer"] != first["vision config and tokenizer"]
    assert hashed[3:] == [str(folder / "config.json")]
    run.close()


class Saved:
    """A checkpoint as far as its inputs are compared."""

    url = "step-000000003"

    def __init__(self, **identity: str) -> None:
        self.state = state_of(3, frozen_identity=identity, data_identity="order")


def test_a_resume_with_other_inputs_names_them_and_older_checkpoints_know_fewer() -> None:
    now = {"vision": "a", "vision config and tokenizer": "b"}
    check_same_inputs(Saved(vision="a"), now, "order")
    check_same_inputs(Saved(**now), now, "order")
    with pytest.raises(CheckpointError, match="trained with other vision config and tokenizer; restore"):
        check_same_inputs(Saved(**now), now | {"vision config and tokenizer": "c"}, "order")
    with pytest.raises(CheckpointError, match="trained with other vision, data order"):
        check_same_inputs(Saved(vision="z"), now, "other")
