"""`isthmus import` of the original's checkpoints: of both stages, with and without their encoder."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import Blip2ForImageTextRetrieval
from typer.testing import CliRunner

from isthmus.cluster.cli.model import app
from isthmus.model.config import QFormerConfig
from isthmus.model.errors import ModelError
from isthmus.model.formats.captioner import load_captioner
from isthmus.model.formats.hf_export import export_native
from isthmus.model.formats.hf_import import HEADS, PROJECTION, trained_names
from isthmus.model.formats.key_mapping import reference_name
from isthmus.model.formats.lavis import import_lavis
from isthmus.model.generate import Decoding, caption
from isthmus.model.tiny import write_tiny_language, write_tiny_vocabulary
from tests.stage2_parts import picture, write_blip2_vision

pytestmark = pytest.mark.unit
IMAGE_WIDTH = 24
QFORMER = QFormerConfig(
    hidden_size=64, num_layers=3, num_heads=1, intermediate_size=96, num_queries=4, vocab_size=60, max_positions=40,
    projection_size=16,
)  # fmt: skip


def write_checkpoint(path, stage, llm="opt"):
    """Save random tensors under LAVIS' names; return them by ours."""
    from isthmus.model.qformer.qformer import QFormer

    torch.manual_seed(3)
    shapes = {f"qformer.{n}": tuple(p.shape) for n, p in QFormer(QFORMER, IMAGE_WIDTH).named_parameters()}
    shapes |= {"image_projection.weight": (16, 64), "image_projection.bias": (16,)}
    shapes |= {"text_projection.weight": (16, 64), "text_projection.bias": (16,)}
    shapes |= {"itm_head.weight": (2, 64), "itm_head.bias": (2,), "temperature": ()}
    shapes |= {"projection.weight": (32, 64), "projection.bias": (32,)}
    stage2, both = trained_names(QFORMER, IMAGE_WIDTH)
    assert shapes.keys() == set(both)
    names = stage2 if stage == 2 else set(both) - set(PROJECTION)
    ours = {name: torch.randn(shapes[name]) for name in sorted(names)}
    state = {reference_name(name, "lavis", llm): tensor for name, tensor in ours.items()}
    torch.save({"model": state | {"Qformer.cls.predictions.decoder.bias": torch.zeros(60)}}, path)
    return ours


@pytest.mark.parametrize(("stage", "llm"), [(1, "opt"), (2, "opt"), (2, "t5")])
def test_every_trained_tensor_arrives_and_the_report_names_the_rest(tmp_path, stage, llm):
    ours = write_checkpoint(tmp_path / "blip2.pth", stage, llm)
    vision = write_blip2_vision(tmp_path / "encoder")
    shown = CliRunner().invoke(
        app,
        ["import", str(tmp_path / "blip2.pth"), str(tmp_path / "own"), "--vision", str(vision)],
        catch_exceptions=False,
    )
    held = load_file(tmp_path / "own/bridge.safetensors")
    assert held.keys() == ours.keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in held.items())
    description = json.loads((tmp_path / "own/bridge.json").read_text())
    found = QFormerConfig.model_validate(description["qformer"])
    assert (found.num_layers, found.num_queries, found.cross_attention_every) == (3, 4, 2)
    if stage == 1:
        assert found == QFORMER
    assert "left: 1 tensors\n  Qformer.cls.predictions.decoder.bias\n" in shown.output
    new = PROJECTION if stage == 1 else HEADS
    assert all(f"  {name}\n" in shown.output for name in new)


def test_what_cannot_be_imported_leaves_nothing(tmp_path):
    write_checkpoint(tmp_path / "blip2.pth", 1)
    vision = write_blip2_vision(tmp_path / "encoder")
    with pytest.raises(ModelError, match=r"contains no image encoder; give its folder with --vision"):
        import_lavis(tmp_path / "blip2.pth", tmp_path / "own")
    with pytest.raises(ModelError, match=r"a stage-1 checkpoint without a projection .*remove --language"):
        import_lavis(tmp_path / "blip2.pth", tmp_path / "own", vision, language=vision)
    torch.save({"model": {"conv1.weight": torch.zeros(2)}}, tmp_path / "other.pth")
    with pytest.raises(ModelError, match=r"no Q-Former in it"):
        import_lavis(tmp_path / "other.pth", tmp_path / "own", vision)
    assert not (tmp_path / "own").exists()


def test_with_its_language_model_it_writes_captions(tmp_path):
    ours = write_checkpoint(tmp_path / "blip2.pth", 2)
    vision = write_blip2_vision(tmp_path / "encoder")
    language = write_tiny_language(tmp_path / "opt", "opt", width=32)
    import_lavis(tmp_path / "blip2.pth", tmp_path / "own", vision, language)
    model, encoder = load_captioner(tmp_path / "own")
    assert all(torch.equal(parameter, ours[name]) for name, parameter in model.trainable_parameters().items())
    images = torch.stack([picture(row) for row in range(2)])
    texts = caption(model, encoder, images, decoding=Decoding(max_new_tokens=4, num_beams=1))
    assert len(texts) == 2


def test_with_a_vocabulary_stage_1_is_exported_for_transformers(tmp_path):
    ours = write_checkpoint(tmp_path / "blip2.pth", 1)
    vision = write_blip2_vision(tmp_path / "encoder")
    write_tiny_vocabulary(tmp_path / "bert", ["a red dog"])
    import_lavis(tmp_path / "blip2.pth", tmp_path / "own", vision, tokenizer=tmp_path / "bert")
    export_native(tmp_path / "own", tmp_path / "retriever")
    model, report = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "retriever", output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(model.query_tokens, ours["qformer.query_tokens"])
    assert torch.equal(model.vision_projection.weight, ours["image_projection.weight"])
