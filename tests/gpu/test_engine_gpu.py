"""What only a CUDA device can show of the engine; docs/gpu-checklist.md says how to run it."""

from pathlib import Path

import pytest
import torch

from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.model.config import LanguageConfig
from isthmus.model.frozen.language import load_language
from isthmus.model.text.language_batch import pack_language_tokens
from isthmus.trainer.context import LocalContext
from isthmus.trainer.engine.process_group import process_group
from isthmus.trainer.frozen.identity import FrozenGuard
from isthmus.trainer.frozen.zero3 import load_frozen_lm
from tests.engine_toys import MemoryState, accumulate, make_engine, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, see docs/gpu-checklist.md"),
]


@pytest.fixture(autouse=True)
def _group():
    with process_group(LocalContext().rank, 60):
        yield


@pytest.mark.parametrize("template", ["stage1_zero1", "stage1_zero2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_resumes_bit_by_bit(template: str, precision: str) -> None:
    engine = make_engine(template, precision=precision)
    train(engine, 0, 10)
    half, scale = [pieces_of_cpu(engine)], engine.loss_scale
    train(engine, 10, 20)
    full = pieces_of_cpu(engine)
    engine.close()
    resumed = make_engine(template, precision=precision)
    resumed.restore(MemoryState(half), 10, scale)
    train(resumed, 10, 20)
    for ours, theirs in zip(pieces_of_cpu(resumed), full, strict=True):
        assert ours[:4] == theirs[:4]
        assert (ours[4] == theirs[4]).all()
    resumed.close()


def pieces_of_cpu(engine):
    return [(f.name, f.kind, f.shape, f.offset, f.data.cpu().clone().numpy()) for f in engine.fragments()]


def test_fp16_overflow_halves_the_scale() -> None:
    engine = make_engine("stage1_zero1", precision="fp16")
    before = pieces_of_cpu(engine)
    accumulate(engine, 0)
    x, y = torch.ones(1, 10, device=engine.device), torch.ones(1, 7, device=engine.device)
    engine.backward(engine.module.loss(x, y) * float("inf"))
    scale = engine.loss_scale
    assert not engine.step(lr=1e-2).applied
    assert engine.loss_scale == scale / 2
    for ours, theirs in zip(pieces_of_cpu(engine), before, strict=True):
        assert (ours[4] == theirs[4]).all()
    engine.close()


@pytest.mark.parametrize("template", ["stage2_zero3", "stage2_zero3_offload"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frozen_model_on_the_device(tmp_path: Path, template: str, dtype: str) -> None:
    """Input gradients through the partitions equal those through the whole model; the partitions stay as they are."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=97, hidden_size=64, word_embed_proj_dim=64, num_hidden_layers=3, num_attention_heads=4, ffn_dim=128,
        max_position_embeddings=64, dropout=0.0,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(tmp_path)
    context = LocalContext()
    language_config = LanguageConfig(path=str(tmp_path), dtype=dtype)
    sharded = load_frozen_lm(language_config, str(tmp_path), ObjectStore(), context.rank, template)
    whole = load_language(language_config, tmp_path).cuda()
    guard = FrozenGuard(sharded)
    ids = torch.randint(5, 90, (2, 6))
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    (text,) = pack_language_tokens(tokens, torch.ones(2, dtype=torch.bool), 2, is_encoder_decoder=False)
    gradients = []
    for language in (sharded, whole):
        visual = torch.ones(2, 3, 64, device="cuda", requires_grad=True)
        language(visual, text.to("cuda")).backward()
        gradients.append(visual.grad)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)
    guard.check()
