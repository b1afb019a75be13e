"""Candidates and scores: sampling by seeds, what published folders write and score, and which folders are refused."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    CLIPConfig,
    CLIPModel,
    GitConfig,
    GitForCausalLM,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)

from isthmus.model.captioning.judges import open_judge
from isthmus.model.captioning.sampling import SeededNucleus
from isthmus.model.captioning.writers import open_writer
from isthmus.model.decoding import Decoding
from isthmus.model.errors import ModelError
from isthmus.model.formats.captioner import load_captioner
from isthmus.model.generate import caption
from tests.tiny_exports import SIDE_PIXELS, write_exports

pytestmark = pytest.mark.unit
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "green", "blue", "picture", "of", "dog", "cat")
SAMPLE = Decoding(max_new_tokens=6, sample=True)
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
VISION = {**SMALL, "image_size": SIDE_PIXELS, "patch_size": 8}


def seeds(images: int, candidates: int, first: int = 0) -> list[list[int]]:
    return [[first + image * candidates + i for i in range(candidates)] for image in range(images)]


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    return write_exports(tmp_path_factory.mktemp("exports"))


@pytest.fixture(name="images_BHWC")
def noise():
    return torch.randint(
        0, 256, (4, SIDE_PIXELS, SIDE_PIXELS, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def write_published(folder, model, *, crop=False):
    """A folder of transformers with tokenizer and image constants."""
    torch.manual_seed(0)
    model.eval().save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", bos_token="[CLS]", eos_token="[SEP]"
    ).save_pretrained(folder)
    constants = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "do_center_crop": crop}
    (folder / "preprocessor_config.json").write_text(json.dumps(constants))
    return folder


def blip_config():
    text = {
        **SMALL,
        "vocab_size": len(WORDS),
        "bos_token_id": 2,
        "eos_token_id": 3,
        "sep_token_id": 3,
        "pad_token_id": 0,
    }
    text |= {"encoder_hidden_size": 32, "max_position_embeddings": 24, "projection_dim": 16}
    return BlipConfig(text_config=text, vision_config={**VISION, "projection_dim": 16}, projection_dim=16)


def test_a_draw_is_a_function_of_seed_and_position():
    scores_RV = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(5, 3, dtype=torch.long)
    drawn = SeededNucleus([7, 1, 7, 2, 3], 0.9, 1.0)(ids, scores_RV)
    alone = SeededNucleus([7], 0.9, 1.0)(ids[2:3], scores_RV[2:3])
    assert torch.equal(drawn[2:3], alone)
    assert torch.equal((drawn == 0).sum(dim=1), torch.ones(5, dtype=torch.long))
    later = [int(SeededNucleus([7], 1.0, 2.0)(torch.zeros(1, n), scores_RV[:1]).argmax()) for n in range(40)]
    assert len(set(later)) > 10


def test_draws_have_the_distribution_of_the_nucleus():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    count = 20_000
    scores = probabilities.log().expand(count, 4)
    drawn = SeededNucleus(range(count), 0.9, 1.0)(torch.zeros(count, 1), scores).argmax(dim=1)
    shares = torch.bincount(drawn, minlength=4) / count
    expected = torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95  # the third still begins within 0.9
    assert shares[3] == 0
    assert (shares - expected).abs().max() < 5 * (0.25 / count) ** 0.5


def test_the_temperature_divides_the_logits():
    cold = SeededNucleus(range(1000), 1.0, 0.01)(torch.zeros(1000, 1), torch.tensor([[1.0, 1.2, 0.9]]).expand(1000, 3))
    assert set(cold.argmax(dim=1).tolist()) == {1}


def test_a_candidate_does_not_depend_on_its_neighbours(exports, images_BHWC):
    writer = open_writer(exports[0])
    first = writer.write(images_BHWC, seeds(4, 3), SAMPLE)
    others = torch.cat([images_BHWC[:1], images_BHWC[1:].flip(0)])
    again = writer.write(others, [seeds(4, 3)[0], *seeds(3, 3, first=100)], SAMPLE)
    assert [len(texts) for texts in first] == [3] * 4
    assert again[0] == first[0]
    assert again[1:] != first[1:]
    assert len({text for texts in first for text in texts}) > 6


def test_the_best_beam_is_the_caption_of_isthmus_caption(exports, images_BHWC):
    writer = open_writer(exports[0])
    beams = Decoding(max_new_tokens=6, num_beams=4)
    found = writer.write(images_BHWC, seeds(4, 2), beams)
    model, encoder = load_captioner(exports[0])
    pixels = model.vision.normalize(images_BHWC.permute(0, 3, 1, 2))
    assert [texts[0] for texts in found] == [text.strip() for text in caption(model, encoder, pixels, decoding=beams)]


@pytest.mark.parametrize("kind", ["blip", "git"])
def test_published_captioners_write_seeded_candidates(kind, images_BHWC, tmp_path):
    torch.manual_seed(0)
    if kind == "blip":
        model = BlipForConditionalGeneration(blip_config())
    else:
        text = {**SMALL, "vocab_size": len(WORDS), "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
        model = GitForCausalLM(GitConfig(vision_config=VISION, **text, max_position_embeddings=64))
    writer = open_writer(write_published(tmp_path, model))
    first = writer.write(images_BHWC, seeds(4, 3), SAMPLE)
    assert first == writer.write(images_BHWC, seeds(4, 3), SAMPLE)
    assert first != writer.write(images_BHWC, seeds(4, 3, first=50), SAMPLE)
    assert {word for texts in first for text in texts for word in text.split()} <= set(WORDS)
    beams = writer.write(images_BHWC, seeds(4, 2), Decoding(max_new_tokens=4, num_beams=1))
    assert [len(texts) for texts in beams] == [2] * 4


def test_stage_1_scores_pairs_as_its_model_does(exports, images_BHWC):
    judge = open_judge(exports[1])
    texts = [["a red picture", "a blue picture"], ["number", ""]] * 2
    found = judge.score(images_BHWC, texts)
    alone = judge.score(images_BHWC[1:2], [["number"]])
    assert found["itc"].shape == found["itm"].shape == (4, 2)
    assert torch.allclose(found["itc"][1, 0], alone["itc"][0, 0], atol=1e-5)
    assert torch.allclose(found["itm"][1, 0], alone["itm"][0, 0], atol=1e-5)
    assert bool(((found["itm"] > 0) & (found["itm"] < 1)).all())
    assert bool((found["itc"].abs() <= 1 + 1e-6).all())


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_clip_and_siglip_score_cosines(kind, images_BHWC, tmp_path):
    text = {**SMALL, "vocab_size": len(WORDS), "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}
    text |= {"max_position_embeddings": 16, "projection_size": 32}
    if kind == "clip":
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=32))
    else:
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
    judge = open_judge(write_published(tmp_path, model, crop=True))
    assert judge.image_input.central_square
    found = judge.score(images_BHWC, [["a dog", "a red cat"]] * 4)["clip"]
    pixels = judge.image_input.normalize(images_BHWC)
    ids = torch.tensor([[2, 4, 10, 3] + [0] * 12, [2, 4, 5, 11, 3] + [0] * 11])
    mask = {"attention_mask": (ids != 0).long()} if kind == "clip" else {}
    with torch.no_grad():
        output = model(input_ids=ids, pixel_values=pixels, **mask)
    logits = (output.logits_per_image - getattr(model, "logit_bias", 0.0)) / model.logit_scale.exp()
    assert torch.allclose(found, logits, atol=1e-5)


@pytest.mark.parametrize("kind", ["stage1", "retrieval", "clip", "empty"])
def test_what_cannot_write_is_refused_in_one_line(kind, exports, tmp_path):
    if kind == "stage1":
        folder = exports[1]
    elif kind == "retrieval":
        folder = write_published(tmp_path, BlipForImageTextRetrieval(blip_config()))
    elif kind == "clip":
        folder = write_published(tmp_path, BertLMHeadModel(BertConfig(**SMALL, vocab_size=len(WORDS))))
    else:
        folder = tmp_path
    with pytest.raises(ModelError) as error:
        open_writer(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("kind", ["stage2", "bert"])
def test_what_cannot_score_is_refused_in_one_line(kind, exports, tmp_path):
    folder = exports[0]
    if kind == "bert":
        folder = write_published(tmp_path, BertLMHeadModel(BertConfig(**SMALL, vocab_size=len(WORDS))))
    with pytest.raises(ModelError) as error:
        open_judge(folder)
    assert "\n" not in str(error.value)
