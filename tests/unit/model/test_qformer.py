"""The Q-Former's size, its start from BERT, its tokens, and inputs that do not fit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertModel

from isthmus.model.config import QFormerConfig
from isthmus.model.errors import ModelError
from isthmus.model.formats.key_mapping import reference_name
from isthmus.model.formats.native import load_trained
from isthmus.model.objectives.communicator import LocalCommunicator
from isthmus.model.objectives.stage1 import Stage1Model
from isthmus.model.objectives.stage1_batch import Stage1Inputs
from isthmus.model.objectives.step import StepContext
from isthmus.model.qformer.bert_init import load_bert
from isthmus.model.qformer.packing import pack_captions
from isthmus.model.qformer.qformer import QFormer, is_query_side
from isthmus.model.text.qformer_tokenizer import QFormerEncoder
from isthmus.model.tiny import write_tiny_vision, write_tiny_vocabulary

pytestmark = pytest.mark.unit

SIZES = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24, "vocab_size": 21}
SMALL = QFormerConfig(**SIZES, max_positions=12, num_queries=3, projection_size=4, dropout=0.0)
IMAGE_WIDTH = 10


def test_full_size_trains_186_7_million_parameters():
    with torch.device("meta"):
        model = Stage1Model(None, QFormer(QFormerConfig(), 1408))
        query_side = QFormer(QFormerConfig(), 1408, with_text=False)
    assert sum(x.numel() for x in model.trainable_parameters().values()) == 186_705_470
    # Queries, layers without text networks, the embeddings' LayerNorm, and ln_vision: what stage 2 trains here.
    assert sum(x.numel() for x in query_side.parameters()) == 105_165_056
    assert set(model.qformer.query_side_parameters()) == dict(query_side.named_parameters()).keys()


def write_bert(folder: Path, network: type = BertForMaskedLM, **other: int) -> dict[str, torch.Tensor]:
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "vocab_size": 20,
        "max_position_embeddings": 12,
    }
    model = network(BertConfig(**sizes | other))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return model.state_dict()


def test_bert_gives_self_attention_both_feed_forward_networks_and_embeddings(tmp_path):
    bert = write_bert(tmp_path)
    qformer = QFormer(SMALL, IMAGE_WIDTH)
    before = {name: x.clone() for name, x in qformer.state_dict().items()}
    random = load_bert(qformer, tmp_path)
    ours = qformer.state_dict()
    layer = "bert.encoder.layer.1"
    for name, theirs in {
        "layer_norm.weight": "bert.embeddings.LayerNorm.weight",
        "position_embeddings.weight": "bert.embeddings.position_embeddings.weight",
        "layers.1.attention.query.weight": f"{layer}.attention.self.query.weight",
        "layers.1.attention.key.bias": f"{layer}.attention.self.key.bias",
        "layers.1.attention.output.weight": f"{layer}.attention.output.dense.weight",
        "layers.1.attention.layer_norm.bias": f"{layer}.attention.output.LayerNorm.bias",
        "layers.1.text_ffn.up.weight": f"{layer}.intermediate.dense.weight",
        "layers.1.query_ffn.up.weight": f"{layer}.intermediate.dense.weight",
        "layers.1.text_ffn.down.bias": f"{layer}.output.dense.bias",
        "layers.1.query_ffn.layer_norm.weight": f"{layer}.output.LayerNorm.weight",
        "language_head.dense.weight": "cls.predictions.transform.dense.weight",
    }.items():
        assert torch.equal(ours[name], bert[theirs]), name
    for name, theirs in {
        "word_embeddings.weight": "bert.embeddings.word_embeddings.weight",
        "language_head.bias": "cls.predictions.bias",
    }.items():
        assert torch.equal(ours[name][:20], bert[theirs])
        assert torch.equal(ours[name][20:], before[name][20:]), "[DEC] stays as drawn"
    assert {name.split(".")[0] for name in random} == {"query_tokens", "ln_vision", "layers"}
    assert all("cross_attention" in name for name in random if name.startswith("layers"))
    assert all(torch.equal(ours[name], before[name]) for name in random)


def test_bert_without_a_head_leaves_the_head_random(tmp_path):
    write_bert(tmp_path, BertModel)
    random = load_bert(QFormer(SMALL, IMAGE_WIDTH), tmp_path)
    assert sum(name.startswith("language_head") for name in random) == 5
    query_side = QFormer(SMALL, IMAGE_WIDTH, with_text=False)
    assert all(is_query_side(name) for name in load_bert(query_side, tmp_path))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"num_hidden_layers": 3}, r"num_layers is 2, num_hidden_layers there is 3"),
        ({"intermediate_size": 32}, r"intermediate_size is 24, intermediate_size there is 32"),
        ({"vocab_size": 22}, r"\(22, 16\), word_embeddings\.weight is \(21, 16\)"),
        ({"max_position_embeddings": 9}, r"\(9, 16\), position_embeddings\.weight is \(12, 16\)"),
    ],
)
def test_bert_of_other_sizes_is_refused(other, message, tmp_path):
    write_bert(tmp_path, **other)
    with pytest.raises(ModelError, match=message):
        load_bert(QFormer(SMALL, IMAGE_WIDTH), tmp_path)


def test_a_lost_bert_weight_is_named(tmp_path):
    write_bert(tmp_path)
    path = tmp_path / "model.safetensors"
    lost = "bert.encoder.layer.1.output.dense.weight"
    save_file({name: x for name, x in load_file(path).items() if name != lost}, path)
    with pytest.raises(ModelError, match=r"no weight encoder\.layer\.1\.output\.dense\.weight for layers\.1\."):
        load_bert(QFormer(SMALL, IMAGE_WIDTH), tmp_path)


def small_inputs(width: int = IMAGE_WIDTH, length: int = 5) -> Stage1Inputs:
    real = torch.arange(length) < torch.tensor([[length], [3]])
    return Stage1Inputs(
        input_ids_BT=torch.randint(1, 20, (2, length)).masked_fill(~real, 0),
        attention_mask_BT=real.long(),
        valid_B=torch.ones(2, dtype=torch.bool),
        rows_B=torch.arange(2),
        image_BPD=torch.randn(2, 4, width),
    )


def run(inputs: Stage1Inputs, model: Stage1Model | None = None) -> float:
    model = model or Stage1Model(None, QFormer(SMALL, IMAGE_WIDTH))
    output = model.loss_and_backward(inputs, StepContext(LocalCommunicator(), 2, backward=torch.Tensor.backward))
    return float(output.total)


def test_inputs_that_do_not_fit_are_refused():
    assert run(small_inputs()) > 0
    inputs = small_inputs()
    for message, wrong in {
        r"width 9, .* built for 10": small_inputs(width=9),
        r"text has 13 tokens, the Q-Former has 12 positions": small_inputs(length=13),
        r"valid_B has 2 rows, but \{'rows_B': 1\}": replace(inputs, rows_B=torch.arange(1)),
        r"input_ids are \(2, 5\), attention_mask \(2, 4\)": replace(
            inputs, attention_mask_BT=inputs.attention_mask_BT[:, :4]
        ),
        r"1 valid rows have no token": replace(
            inputs, attention_mask_BT=inputs.attention_mask_BT * torch.tensor([[1], [0]])
        ),
    }.items():
        with pytest.raises(ModelError, match=message):
            run(wrong)


def test_heads_must_divide_the_width():
    with pytest.raises(ModelError, match=r"num_heads=3 does not divide qformer\.hidden_size=16"):
        QFormer(SMALL.model_copy(update={"num_heads": 3}), IMAGE_WIDTH)


def test_checkpoints_of_the_original_are_read(tmp_path):
    source, target = (Stage1Model(None, QFormer(SMALL, IMAGE_WIDTH)) for _ in range(2))
    state = {str(reference_name(name, "lavis")): x.detach() for name, x in source.trainable_parameters().items()}
    path = tmp_path / "checkpoint.pth"
    # The original's files hold a tied copy of the word embeddings, and a schedule beside the weights.
    tied = {"Qformer.cls.predictions.decoder.weight": state["Qformer.bert.embeddings.word_embeddings.weight"]}
    torch.save({"model": state | tied, "epoch": 9}, path)
    load_trained(target, path)
    inputs = small_inputs()
    assert run(inputs, target) == run(inputs, source)
    name = "Qformer.bert.encoder.layer.0.crossattention.self.key.weight"
    torch.save({"model": state | {name: torch.zeros(16, 9)}}, path)
    with pytest.raises(ModelError, match=r"key\.weight has shape \(16, 9\), the model needs \(16, 10\)"):
        load_trained(target, path)
    del state[name]
    torch.save({"model": state}, path)
    with pytest.raises(ModelError, match=r"1 of \d+ trained tensors are missing.*cross_attention\.key\.weight"):
        load_trained(target, path)


# What queries and text may see, shown on the passes themselves: change one input, see which outputs move.
@torch.no_grad()
def test_queries_and_text_see_what_their_pass_allows():
    qformer = QFormer(SMALL, IMAGE_WIDTH).eval()
    for parameter in qformer.parameters():  # large enough for what is seen to show
        torch.nn.init.normal_(parameter, std=0.3)
    inputs = small_inputs()
    ids, mask, images = inputs.input_ids_BT, inputs.attention_mask_BT, inputs.image_BPD
    other_ids = ids.clone()
    other_ids[0, 3] = (ids[0, 3] + 1) % 20
    other_images = images + torch.randn_like(images)

    model = Stage1Model(None, qformer)

    def passes(ids, images):
        text, image_kv = pack_captions(ids, mask), qformer.image_kv(images)
        encoded = model.encode(text, images)
        matched = model.match(text, model.embed_text(text), image_kv.layers)
        return encoded.image_BQE, encoded.text_BE, matched, encoded.source_KD

    base = passes(ids, images)
    moved = [
        [not torch.allclose(x[0], y[0], atol=1e-6) for x, y in zip(base, passes(*change), strict=True)]
        for change in ((other_ids, images), (ids, other_images))
    ]
    # queries and text of contrast, matching; then the first token ([DEC]) of generation
    assert moved == [[False, True, True, False], [True, False, True, True]]


CAPTIONS = ["A red circle", "two dogs play in the park near a tree", ""]


@pytest.fixture
def words(tmp_path):
    write_tiny_vocabulary(tmp_path, ["a red circle", "two dogs play in the park near a tree"])
    return tmp_path


def test_captions_become_cls_words_sep_and_padding(words):
    encoder = QFormerEncoder(words, 6)
    rows = encoder(CAPTIONS)
    vocabulary = (words / "vocab.txt").read_text().split()
    tokens = [[vocabulary[i] for i in row] for row in rows["input_ids"].tolist()]
    assert tokens == [
        ["[CLS]", "a", "red", "circle", "[SEP]", "[PAD]"],
        ["[CLS]", "two", "dogs", "play", "in", "[SEP]"],
        ["[CLS]", "[SEP]", *["[PAD]"] * 4],
    ]
    assert rows["attention_mask"].sum(dim=1).tolist() == [5, 6, 2]
    assert rows["input_ids"].dtype == torch.int64
    assert encoder([])["input_ids"].shape == (0, 6)
    assert encoder.decode(rows["input_ids"][0].tolist()) == "a red circle"
    assert encoder.vocab_size == len(vocabulary) + 1


def test_the_vocabulary_must_have_room_for_dec(words):
    encoder = QFormerEncoder(words, 6)
    size = encoder.vocab_size
    encoder.check(QFormerConfig(vocab_size=size))
    with pytest.raises(ModelError, match=rf"{size} tokens including \[DEC\], qformer\.vocab_size is {size - 1}"):
        encoder.check(QFormerConfig(vocab_size=size - 1))


def test_dec_of_the_tokenizer_must_come_last(words):
    vocabulary = (words / "vocab.txt").read_text()
    (words / "vocab.txt").write_text(vocabulary + "[DEC]\n")
    size = len(vocabulary.split()) + 1
    assert QFormerEncoder(words, 6).vocab_size == size
    (words / "vocab.txt").write_text(vocabulary + "[DEC]\nlate\n")
    with pytest.raises(ModelError, match=rf"\[DEC\] has id {size - 1} of {size + 1} tokens; it must be the last"):
        QFormerEncoder(words, 6).check(QFormerConfig())


def test_a_folder_without_tokenizer_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"neither tokenizer\.json nor vocab\.txt"):
        QFormerEncoder(tmp_path, 6)(["a"])
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(ModelError, match=r"lacks \[CLS\], \[PAD\], \[SEP\]"):
        QFormerEncoder(tmp_path, 6)(["a"])


def test_tiny_parts_are_the_same_every_time(tmp_path):
    for name in ("one", "two"):
        write_tiny_vision(tmp_path / name / "vision")
        write_tiny_vocabulary(tmp_path / name / "bert", ["b a"])
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) >= 5
    assert all((tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes() for path in files)
    write_tiny_vision(tmp_path / "three", seed=1)
    weights = [load_file(tmp_path / x / "model.safetensors") for x in ("one/vision", "three")]
    name = next(name for name in weights[0] if name.endswith("weight") and weights[0][name].ndim == 2)
    assert not torch.equal(weights[0][name], weights[1][name])


@pytest.mark.parametrize("width", [16, 192, 768])
def test_a_drawn_layer_leaves_the_size_of_its_input_at_every_width(width):
    config = QFormerConfig(**SIZES | {"hidden_size": width, "num_layers": 1, "intermediate_size": width})
    weights = torch.cat([layer.attention.value.weight.flatten() for layer in QFormer(config, width).layers])
    size = float(weights.std()) * width**0.5
    assert size == pytest.approx(0.02 * 768**0.5, rel=0.2)
