"""From what people have to a finished stage 2: three commands, each in a process of its own."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import Blip2VisionConfig, Blip2VisionModel

from isthmus.demo.tiny.assets import write_tiny_assets
from isthmus.model.config import QFormerConfig
from isthmus.model.formats.key_mapping import reference_name
from isthmus.model.qformer.qformer import QFormer
from isthmus.trainer.config.loading import load_config
from isthmus.trainer.config.schema import TrainConfig
from tests.integration.cluster.raylets import ROOT
from tests.unit.model.test_import_towers import lavis_eva
from tests.unit.model.test_imports import as_pickle

pytestmark = [pytest.mark.integration, pytest.mark.slow]
IMAGE_WIDTH = 176  # two heads of EVA-CLIP's 88


def isthmus(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "isthmus.cluster.cli.main", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write_lavis(path, qformer):
    """Save a stage-1 checkpoint with its EVA-CLIP as LAVIS does, and return the trained tensors by our names."""
    torch.manual_seed(5)
    bridge = QFormer(qformer, IMAGE_WIDTH)
    ours = {f"qformer.{name}": parameter.detach() for name, parameter in bridge.named_parameters()}
    width, inner = qformer.hidden_size, qformer.projection_size
    for head, out in (("image_projection", inner), ("text_projection", inner), ("itm_head", 2)):
        ours |= {f"{head}.weight": torch.randn(out, width), f"{head}.bias": torch.randn(out)}
    ours["temperature"] = torch.tensor(0.07)
    sizes = {"hidden_size": IMAGE_WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    network = Blip2VisionModel(Blip2VisionConfig(**sizes, image_size=64, patch_size=16))
    encoder = {f"visual_encoder.{name}": tensor for name, tensor in lavis_eva(network, num_unused=0).items()}
    torch.save({"model": encoder | {reference_name(name, "lavis"): tensor for name, tensor in ours.items()}}, path)
    return ours


def test_three_commands_lead_from_published_files_to_a_finished_stage_2(tmp_path):
    assets, runs = tmp_path / "assets", tmp_path / "runs"
    write_tiny_assets(assets, 64, 4)
    as_pickle(assets / "opt", tmp_path / "opt-published")
    recipe = ROOT / "recipes" / "tiny.yaml"
    qformer = QFormerConfig.model_validate(load_config(recipe, [], TrainConfig).model.qformer)
    trained = write_lavis(tmp_path / "blip2_pretrained.pth", qformer)

    isthmus("models", "get", tmp_path / "opt-published", tmp_path / "opt")
    report = isthmus("import", tmp_path / "blip2_pretrained.pth", tmp_path / "blip2")
    assert f"taken: {len(trained)} tensors" in report
    isthmus(
        "train", recipe, "--local", f"run.url={runs}", "run.export=true", f"data.sources.0.manifest={assets}/train",
        f"model.vision.path={tmp_path}/blip2/vision", f"model.language.path={tmp_path}/opt",
        f"model.qformer.tokenizer={assets}/bert", "stage1=null", f"stage2.init_from={tmp_path}/blip2",
        "stage2.steps=4", "evaluation.manifest=null", "checkpoint.every_steps=4",
    )  # fmt: skip

    record = json.loads((runs / "tiny" / "run.json").read_text())
    assert record["handoffs"]["stage2"]["url"] == str(tmp_path / "blip2")
    taken = record["handoffs"]["stage2"]["taken"]
    assert "qformer.query_tokens" in taken
    assert set(taken) < trained.keys()
    assert set(record["handoffs"]["stage2"]["dropped"]) == trained.keys() - set(taken)
    assert record["export"]["step"] == 4
    exported = tmp_path / "exported"
    isthmus("export", runs / "tiny", exported, "--to", "own")
    after = load_file(exported / "bridge.safetensors")
    assert set(taken) < after.keys()
    # Four steps at a low rate have moved every taken tensor a little: it is training that began from them.
    moved = {name: float((after[name] - trained[name]).abs().max()) for name in taken}
    assert all(0 < change < 0.01 for change in moved.values()), moved
