"""An OPT export has the tensors that vLLM's BLIP-2 loader fills: every one, no other, in its shapes.

The names are those that vLLM 0.33.0 gives its parameters (vllm/model_executor/models/blip2.py, blip.py, opt.py). Its
loader refuses a file with another name. `tests/integration/model/test_vllm.py` runs vLLM itself where it is installed.
"""

from collections import defaultdict

import pytest
from transformers import AutoTokenizer, Blip2Config, Blip2Processor, GenerationConfig

from isthmus.model.formats.hf_export import export_captioner
from isthmus.model.imports.tensors import open_tensors
from tests.stage2_parts import IMAGE_PIXELS, QFORMER, stage2_parts

pytestmark = pytest.mark.unit
# The three projections of OPT's attention are one parameter there, filled in three parts.
STACKED = {".q_proj.": ".qkv_proj.", ".k_proj.": ".qkv_proj.", ".v_proj.": ".qkv_proj."}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root = tmp_path_factory.mktemp("vllm")
    parts = stage2_parts(root, "opt")
    export_captioner(root / "export", parts.model.trainable_parameters(), QFORMER, parts.vision, parts.language)
    return root / "export"


def linear(name, out, width):
    return {f"{name}.weight": (out, width), f"{name}.bias": (out,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def vision_parameters(config):
    width, inner = config.hidden_size, config.intermediate_size
    root, places = "vision_model", (config.image_size // config.patch_size) ** 2 + 1
    found = {
        f"{root}.embeddings.class_embedding": (1, 1, width),
        f"{root}.embeddings.position_embedding": (1, places, width),
        f"{root}.embeddings.patch_embedding.weight": (width, 3, config.patch_size, config.patch_size),
        f"{root}.embeddings.patch_embedding.bias": (width,),
        **norm(f"{root}.post_layernorm", width),
    }
    for i in range(config.num_hidden_layers):
        layer = f"{root}.encoder.layers.{i}"
        found |= linear(f"{layer}.self_attn.qkv", 3 * width, width) | norm(f"{layer}.layer_norm1", width)
        found |= linear(f"{layer}.self_attn.projection", width, width) | norm(f"{layer}.layer_norm2", width)
        found |= linear(f"{layer}.mlp.fc1", inner, width) | linear(f"{layer}.mlp.fc2", width, inner)
    return found


def attention_parameters(name, width, read):
    found = linear(f"{name}.output.dense", width, width) | norm(f"{name}.output.LayerNorm", width)
    for part, size in (("query", width), ("key", read), ("value", read)):
        found |= linear(f"{name}.attention.{part}", width, size)
    return found


def bridge_parameters(config):
    qformer = config.qformer_config
    width, inner, image_width = qformer.hidden_size, qformer.intermediate_size, config.vision_config.hidden_size
    found = {"query_tokens": (1, config.num_query_tokens, width), **norm("qformer.layernorm", width)}
    for i in range(qformer.num_hidden_layers):
        layer = f"qformer.encoder.layer.{i}"
        found |= attention_parameters(f"{layer}.attention", width, width)
        if i % qformer.cross_attention_frequency == 0:
            found |= attention_parameters(f"{layer}.crossattention", width, image_width)
        found |= linear(f"{layer}.intermediate_query.dense", inner, width)
        found |= linear(f"{layer}.output_query.dense", width, inner) | norm(f"{layer}.output_query.LayerNorm", width)
    return found | linear("language_projection", config.text_config.hidden_size, width)


def opt_parameters(config):
    root, width = "language_model.model.decoder", config.hidden_size
    found = {
        f"{root}.embed_tokens.weight": (config.vocab_size, config.word_embed_proj_dim),
        f"{root}.embed_positions.weight": (config.max_position_embeddings + 2, width),
        **norm(f"{root}.final_layer_norm", width),
    }
    for i in range(config.num_hidden_layers):
        layer = f"{root}.layers.{i}"
        found |= linear(f"{layer}.self_attn.qkv_proj", 3 * width, width)
        found |= linear(f"{layer}.self_attn.out_proj", width, width)
        found |= norm(f"{layer}.self_attn_layer_norm", width) | norm(f"{layer}.final_layer_norm", width)
        found |= linear(f"{layer}.fc1", config.ffn_dim, width) | linear(f"{layer}.fc2", width, config.ffn_dim)
    return found


def as_loaded(folder):
    """Return the shapes of the file's tensors under vLLM's names, stacked parts added up."""
    parts = defaultdict(list)
    for name, tensor in open_tensors(folder).items():
        stacked = next((theirs for ours, theirs in STACKED.items() if ours in name), None)
        ours = next((ours for ours in STACKED if ours in name), "")
        parts[name.replace(ours, stacked) if stacked else name].append(tensor.shape)
    return {name: (sum(shape[0] for shape in shapes), *shapes[0][1:]) for name, shapes in parts.items()}


def test_every_parameter_of_the_loader_is_in_the_file_and_nothing_else(exported):
    config = Blip2Config.from_pretrained(exported)
    assert config.text_config.tie_word_embeddings  # so the loader needs no lm_head
    wanted = vision_parameters(config.vision_config) | bridge_parameters(config) | opt_parameters(config.text_config)
    assert as_loaded(exported) == wanted


def test_what_the_loader_reads_beside_the_weights(exported):
    config, tokenizer = Blip2Config.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    assert config.architectures == ["Blip2ForConditionalGeneration"]
    assert config.vision_config.qkv_bias is True
    # It inserts the token of this name num_query_tokens times, before the prompt with its start token.
    assert tokenizer.get_vocab()["<image>"] == config.image_token_index < config.text_config.vocab_size
    processor = Blip2Processor.from_pretrained(exported)
    assert processor.image_processor.size == {"height": IMAGE_PIXELS, "width": IMAGE_PIXELS}
    newline = tokenizer("\n", add_special_tokens=False).input_ids[-1]
    assert GenerationConfig.from_pretrained(exported).eos_token_id == config.text_config.eos_token_id == newline
