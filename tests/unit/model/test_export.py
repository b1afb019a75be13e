"""Exports: transformers loads them whole, computes the same logits and says the same; all formats come back."""

from contextlib import contextmanager

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    GenerationConfig,
)

from isthmus.model.config import QFormerConfig
from isthmus.model.decoding import Decoding
from isthmus.model.errors import ModelError
from isthmus.model.formats.captioner import load_captioner
from isthmus.model.formats.hf_export import export_captioner, export_retriever, hf_can_hold
from isthmus.model.formats.key_mapping import reference_name
from isthmus.model.formats.native import bridge_configs, export_bridge, load_trained, read_trained
from isthmus.model.generate import answer, caption
from isthmus.model.imports.tensors import open_tensors
from isthmus.model.objectives.communicator import LocalCommunicator
from isthmus.model.objectives.stage1 import Stage1Model
from isthmus.model.objectives.step import StepContext
from isthmus.model.qformer.packing import pack_captions
from isthmus.model.qformer.qformer import QFormer
from isthmus.model.safetensors_io import write_tensors
from isthmus.model.text.language_batch import pack_language_tokens
from isthmus.model.tiny import write_tiny_vision, write_tiny_vocabulary
from tests.stage2_parts import QFORMER, stage2_parts

pytestmark = pytest.mark.unit
KINDS = ("opt", "llama", "t5")
FEW = Decoding(max_new_tokens=6, num_beams=1)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module", params=KINDS)
def exported(request, root):
    parts = stage2_parts(root, request.param)
    folder = root / f"export-{request.param}"
    export_captioner(folder, parts.model.trainable_parameters(), QFORMER, parts.vision, parts.language)
    model, report = Blip2ForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    return parts, folder, model.eval(), report


def with_placeholders(parts, model, ids, mask):
    queries = torch.full((ids.shape[0], QFORMER.num_queries), model.config.image_token_index)
    return torch.cat([queries, ids], dim=1), torch.cat([torch.ones_like(queries), mask], dim=1)


@contextmanager
def in_double(*models):
    """Run models in float64, where a bound holds on every CPU; float32 weights come back as they were."""
    for model in models:
        model.double()
        if hasattr(model, "vision"):
            model.vision.config = model.vision.config.model_copy(update={"dtype": "float64"})
    yield
    for model in models:
        model.float()
        if hasattr(model, "vision"):
            model.vision.config = model.vision.config.model_copy(update={"dtype": "float32"})


def test_transformers_loads_the_export_and_computes_the_same_logits(exported):
    parts, _, model, report = exported
    assert not any(report.values())
    inputs = parts.inputs()
    tokens, images = inputs.tokens, inputs.images_BCHW.double()
    with torch.no_grad(), in_double(parts.model, model):
        visual = parts.model.visual(parts.model.encode(images))
        seq2seq = parts.model.language.is_encoder_decoder
        (text,) = pack_language_tokens(tokens, inputs.valid_B, len(inputs.valid_B), is_encoder_decoder=seq2seq)
        ours = parts.model.language.target_logits(visual, text)
        ids, mask = with_placeholders(parts, model, tokens["input_ids"], tokens["attention_mask"])
        extra = {"labels": tokens["labels"]} if seq2seq else {}
        logits = model(pixel_values=images, input_ids=ids, attention_mask=mask, **extra).logits
    rows, columns = (tokens["labels"] != -100).nonzero(as_tuple=True)
    theirs = logits[rows, columns + (0 if seq2seq else QFORMER.num_queries - 1), : ours.shape[1]]
    torch.testing.assert_close(theirs, ours, atol=1e-10, rtol=0)
    assert torch.equal(text.label_K, tokens["labels"][rows, columns])


def test_the_export_names_no_folder_of_the_machine_that_made_it(exported, root):
    _, folder, _, _ = exported
    assert [path.name for path in folder.glob("*.json") if str(root) in path.read_text()] == []


@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_export_generates_our_captions(exported, num_beams):
    parts, folder, model, _ = exported
    images = parts.inputs().images_BCHW
    decoding = Decoding(max_new_tokens=6, num_beams=num_beams)
    ours = caption(parts.model, parts.encoder, images, decoding=decoding)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    start = torch.tensor([tokenizer("").input_ids] * len(images), dtype=torch.int64).reshape(len(images), -1)
    ids, _ = with_placeholders(parts, model, start, torch.ones_like(start))
    config = GenerationConfig.from_pretrained(folder, max_new_tokens=6, num_beams=num_beams)
    generated = model.generate(pixel_values=images, input_ids=ids, generation_config=config)
    skipped = 1 if parts.model.language.is_encoder_decoder else ids.shape[1]
    assert [parts.encoder.decode(row[skipped:].tolist()) for row in generated] == ours


def test_the_processor_loads_without_torchvision_and_normalises_as_training_does(exported):
    import numpy as np
    from PIL import Image

    _, folder, model, _ = exported
    processor = Blip2Processor.from_pretrained(folder)
    grey = Image.fromarray(np.full((40, 50, 3), 128, np.uint8))
    out = processor(images=grey, text="", return_tensors="pt")
    expected = (128 / 255 - 0.5) / 0.25
    torch.testing.assert_close(out["pixel_values"], torch.full((1, 3, 28, 28), expected), atol=1e-5, rtol=0)
    assert (out["input_ids"] == model.config.image_token_index).sum() == QFORMER.num_queries


def test_t5_keeps_its_own_head_activation_and_scale(root):
    config = AutoConfig.from_pretrained(root / "export-t5") if (root / "export-t5").exists() else None
    assert config is not None
    assert (config.text_config.dense_act_fn, config.text_config.scale_decoder_outputs) == ("gelu", False)
    names = set(open_tensors(root / "export-t5"))
    assert {"language_model.lm_head.weight", "language_model.shared.weight"} <= names


def test_an_exported_bridge_comes_back_unchanged(exported, root):
    parts, folder, _, _ = exported
    fresh = stage2_parts(root, parts.language[1].name).model
    own = root / "own"
    export_bridge(own, parts.model.trainable_parameters(), QFORMER, parts.vision, parts.language)
    for source in (folder, own):
        for parameter in fresh.trainable_parameters().values():
            torch.nn.init.zeros_(parameter)
        load_trained(fresh, source)
        expected = parts.model.trainable_parameters()
        torch.testing.assert_close(fresh.trainable_parameters(), expected, atol=0, rtol=0)
    qformer, vision, language = bridge_configs(own)
    assert qformer == QFORMER
    assert language is not None
    assert vision.image_size_pixels == parts.vision[0].image_size_pixels


def test_answers_do_not_depend_on_the_batch(root):
    parts = stage2_parts(root, "opt")
    images = parts.inputs().images_BCHW
    questions = ["what", "how many small black dogs are there", "a", "is it large"]
    together = answer(parts.model, parts.encoder, images, questions, decoding=FEW)
    alone = [
        answer(parts.model, parts.encoder, images[i : i + 1], questions[i : i + 1], decoding=FEW)[0] for i in range(4)
    ]
    assert together == alone


def test_sampling_is_a_function_of_the_seed(root):
    parts = stage2_parts(root, "llama")
    images = parts.inputs().images_BCHW
    texts = [
        caption(parts.model, parts.encoder, images, decoding=Decoding(8, 1, sample=True, top_p=1.0, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_prompt_beyond_the_context_names_all_figures(root):
    parts = stage2_parts(root, "opt")
    images = parts.inputs().images_BCHW[:1]
    with pytest.raises(ModelError, match=r"4 queries \+ \d+ prompt tokens \+ 30 new tokens exceed .* context of 128"):
        caption(parts.model, parts.encoder, images, prompt="dog " * 200)
    with pytest.raises(ModelError, match="1 images but 2 prompts"):
        answer(parts.model, parts.encoder, images, ["a", "b"])


def stage1_model(parts):
    torch.manual_seed(5)
    model = Stage1Model(parts.model.vision, QFormer(QFORMER, parts.model.vision.width))
    with torch.no_grad():
        for name, parameter in model.trainable_parameters().items():
            if name != "temperature":
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def test_the_retriever_scores_as_we_do(root):
    parts = stage2_parts(root, "opt")
    model = stage1_model(parts)
    write_tiny_vocabulary(root / "bert", ["a red dog"])
    export_retriever(root / "retriever", model.trainable_parameters(), QFORMER, parts.vision, root / "bert")
    hf, report = Blip2ForImageTextRetrieval.from_pretrained(root / "retriever", output_loading_info=True)
    assert not any(report.values())
    hf.eval()
    images = parts.inputs().images_BCHW.double()
    ids = torch.randint(5, 50, (4, 6), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(6) < torch.tensor([6, 4, 3, 5])[:, None]).long()
    with torch.no_grad(), in_double(model, hf):
        contrast = hf(pixel_values=images, input_ids=ids, attention_mask=mask).logits_per_image
        match = hf(images, ids, attention_mask=mask, use_image_text_matching_head=True).logits_per_image
        features, text = model.vision(images), pack_captions(ids, mask)
        image_kv, embedded = model.qformer.image_kv(features), model.embed_text(text)
        similarity = torch.einsum("iqe,te->itq", model.image_vectors(features), model.text_vectors(text)).amax(dim=-1)
        own = model.match(text, embedded, image_kv.layers)
        swapped = model.match(text, embedded, image_kv.select(torch.tensor([3, 2, 1, 0])).layers)
    torch.testing.assert_close(similarity, contrast, atol=1e-10, rtol=0)
    torch.testing.assert_close(own.softmax(-1), match.softmax(-1), atol=1e-10, rtol=0)
    assert not torch.allclose(swapped, own, atol=1e-3)


def test_stage_2_begins_from_stage_1_and_from_the_originals_names(root):
    parts = stage2_parts(root, "opt")
    stage1 = stage1_model(parts)
    trained = stage1.trainable_parameters()
    export_bridge(root / "stage1", trained, QFORMER, parts.vision)
    lavis = {reference_name(name, "lavis"): p.detach().clone() for name, p in trained.items()}
    assert None not in lavis
    torch.save({"model": lavis}, root / "lavis.pth")
    for source in (root / "stage1", root / "lavis.pth"):
        with pytest.raises(ModelError, match=r"2 of \d+ trained tensors are missing, the first is projection"):
            load_trained(parts.model, source)
        found = read_trained(source, list(parts.model.trainable_parameters()))
        assert set(parts.model.trainable_parameters()) - set(found) == {"projection.bias", "projection.weight"}
        assert all(torch.equal(tensor, trained[name]) for name, tensor in found.items())


def test_another_size_is_refused_with_both_shapes(root):
    parts = stage2_parts(root, "opt")
    wide = QFormerConfig(**{**QFORMER.model_dump(), "intermediate_size": 80})
    other = Stage1Model(parts.model.vision, QFormer(wide, parts.model.vision.width))
    export_bridge(root / "wide", other.trainable_parameters(), wide, parts.vision)
    with pytest.raises(ModelError, match=r"query_ffn.up.* has shape \(80,.* needs \(64,"):
        load_trained(stage1_model(parts), root / "wide")


def test_an_encoder_that_transformers_cannot_hold_is_named(root):
    parts = stage2_parts(root, "opt")
    folder = write_tiny_vision(root / "vit")
    assert not hf_can_hold(folder)
    with pytest.raises(ModelError, match=r"encoder of type vit .* native format"):
        export_captioner(
            root / "x", parts.model.trainable_parameters(), QFORMER, (parts.vision[0], folder), parts.language
        )
    assert not (root / "x").exists()


def test_many_shards_read_back(tmp_path):
    tensors = {f"t{i}": torch.randn(50, 10) for i in range(5)}
    write_tensors(tmp_path, ((name, tensor.clone) for name, tensor in tensors.items()), shard_bytes=4500)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    torch.testing.assert_close({name: tensor.read() for name, tensor in open_tensors(tmp_path).items()}, tensors)
    (tmp_path / names[1]).unlink()
    with pytest.raises(ModelError, match="model-00002"):
        open_tensors(tmp_path)


def test_evaluation_without_gradient_leaves_the_mode(root):
    parts = stage2_parts(root, "opt")
    parts.model.train()
    caption(parts.model, parts.encoder, parts.inputs().images_BCHW[:1], decoding=FEW)
    assert parts.model.training
    output = parts.model.loss_and_backward(parts.inputs(), StepContext(LocalCommunicator(), 4))
    assert not output.total.requires_grad


def test_a_transformers_folder_becomes_an_own_export_that_answers(exported, root):
    from PIL import Image
    from typer.testing import CliRunner

    from isthmus.cluster.cli.model import app

    parts, folder, _, _ = exported
    own = root / f"own-{folder.name}"
    picture = root / "picture.png"
    Image.new("RGB", (30, 20), (200, 30, 30)).save(picture)
    run = CliRunner()
    assert run.invoke(app, ["import", str(folder), str(own)]).exit_code == 0
    fresh, encoder = load_captioner(own)
    images = parts.inputs().images_BCHW
    assert caption(fresh, encoder, images, decoding=FEW) == caption(parts.model, parts.encoder, images, decoding=FEW)
    shown = run.invoke(app, ["caption", str(own), str(picture), "--beams", "1", "--max-new-tokens", "4"])
    processor = Blip2Processor.from_pretrained(folder)
    pixels = processor(images=Image.open(picture), return_tensors="pt")["pixel_values"]
    expected = caption(parts.model, parts.encoder, pixels, decoding=Decoding(max_new_tokens=4, num_beams=1))[0]
    assert shown.output.rstrip("\n") == expected
    assert run.invoke(app, ["ask", str(own), str(picture), "what colour"]).exit_code == 0
    finished = root / f"run-{folder.name}"
    finished.mkdir()
    (finished / "run.json").write_text('{"version": 1}')
    (finished / "export").symlink_to(own)
    of_run = run.invoke(app, ["caption", str(finished), str(picture), "--beams", "1", "--max-new-tokens", "4"])
    assert of_run.output == shown.output


def test_the_documented_script_needs_transformers_only(exported, root, monkeypatch, capsys):
    from pathlib import Path

    from PIL import Image

    parts, folder, _, _ = exported
    text = (Path(__file__).parents[3] / "docs" / "export-format.md").read_text()
    script = text.split("```python\n")[1].split("```")[0]
    picture = root / "script.png"
    Image.new("RGB", (30, 20), (20, 90, 30)).save(picture)
    monkeypatch.setattr("sys.argv", ["script", str(folder), str(picture)])
    capsys.readouterr()
    exec(compile(script, "export-format.md", "exec"), {})
    processor = Blip2Processor.from_pretrained(folder)
    pixels = processor(images=Image.open(picture), return_tensors="pt")["pixel_values"]
    assert capsys.readouterr().out.strip() == caption(parts.model, parts.encoder, pixels)[0]


def test_a_transformers_export_is_loaded_as_our_own(exported, root):
    parts, folder, _, _ = exported
    images = parts.inputs().images_BCHW
    model, encoder = load_captioner(folder)
    decoding = Decoding(max_new_tokens=6, num_beams=1)
    found = caption(model, encoder, images, decoding=decoding)
    assert found == caption(parts.model, parts.encoder, images, decoding=decoding)
