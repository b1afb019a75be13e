"""The tiny recipe on a CUDA device: both stages with evaluation, and the same bits twice in deterministic mode."""

from pathlib import Path

import pytest
import torch

from isthmus.cluster.config import JobConfig
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.demo.tiny.assets import write_tiny_assets
from isthmus.trainer.checkpoint.reader import list_checkpoints
from isthmus.trainer.config.loading import load_config
from isthmus.trainer.context import Outcome
from isthmus.trainer.run_local import train_here

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, see docs/gpu-checklist.md"),
]


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_assets(folder, 120, 24)
    return folder


def train(assets: Path, runs: Path, *overrides: str) -> dict[str, torch.Tensor]:
    """Train a few steps of the real Q-Former with dropout, both stages; return the trained tensors of both."""
    config = load_config(
        "tiny.yaml",
        [
            f"run.url={runs}", f"data.sources=[{{manifest: {assets / 'train'}}}]",
            f"evaluation.manifest={assets / 'held-out'}", f"model.vision.path={assets / 'vision'}",
            f"model.qformer.tokenizer={assets / 'bert'}", f"model.language.path={assets / 'opt'}",
            "model.qformer.dropout=0.1", "stage1.steps=6", "stage2.steps=4", "stage1.micro_batch_size=16",
            *overrides,
        ],
        JobConfig,
    )  # fmt: skip
    assert train_here(config) is Outcome.FINISHED
    tensors = {}
    for stage in ("stage1", "stage2"):
        saved = list_checkpoints(str(runs / "tiny" / stage / "checkpoints"), ObjectStore())[0]
        tensors |= {f"{stage}.{name}": saved.read_tensor(name) for name in saved.shapes()}
    return tensors


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_both_stages_train_and_evaluate(assets: Path, tmp_path: Path, precision: str) -> None:
    tensors = train(assets, tmp_path, f"stage1.precision={precision}", f"stage2.precision={precision}")
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_deterministic_mode_repeats_a_run_bit_by_bit(assets: Path, tmp_path: Path) -> None:
    options = ["safety.same_bits=run", "stage1.precision=bf16", "stage2.precision=bf16"]
    first, second = (train(assets, tmp_path / name, *options) for name in ("first", "second"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
