"""The sharded frozen language model on gloo ranks: right gradients, its share of the bytes, never changed."""

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.model.config import LanguageConfig
from isthmus.model.frozen.language import LanguageModel, load_language
from isthmus.model.text.language_batch import pack_language_tokens
from isthmus.trainer import safetensors_header
from isthmus.trainer.context import LocalContext, Rank
from isthmus.trainer.errors import TrainerError
from isthmus.trainer.frozen.identity import FrozenGuard, frozen_identity
from isthmus.trainer.frozen.safetensors_index import FrozenWeightsError
from isthmus.trainer.frozen.zero3 import load_frozen_lm
from tests.engine_toys import make_engine
from tests.ranks import run_ranks

pytestmark = pytest.mark.integration
WIDTH, ROWS, QUERIES = 24, 4, 3
THRESHOLD = 100
KINDS = ("opt", "t5")


class Bridge(nn.Module):
    """A trainable projection in front of a frozen language model."""

    def __init__(self, language: LanguageModel) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.projection = nn.Linear(10, WIDTH)
        self.language = language

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.projection.named_parameters(prefix="projection"))

    def loss(self, x: Tensor, tokens: dict[str, Tensor]) -> Tensor:
        valid = torch.ones(len(x), dtype=torch.bool)
        encoder_decoder = self.language.is_encoder_decoder
        (text,) = pack_language_tokens(tokens, valid, len(x), is_encoder_decoder=encoder_decoder)
        return self.language(self.projection(x), text) / num_targets()


def batch() -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(ROWS, QUERIES, 10, generator=generator)
    ids = torch.randint(5, 90, (ROWS, 6), generator=generator)
    labels = ids.clone()
    labels[0, 2:] = -100  # ranks have different numbers of targets
    return x, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def num_targets() -> int:
    return int((batch()[1]["labels"] != -100).sum())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tied OPT in two files and an untied gated T5, random and tiny."""
    from transformers import OPTConfig, OPTForCausalLM, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("frozen")
    opt = OPTConfig(
        vocab_size=97, hidden_size=WIDTH, word_embed_proj_dim=WIDTH, num_hidden_layers=3, num_attention_heads=4,
        ffn_dim=41, max_position_embeddings=40, dropout=0.0,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=97, d_model=WIDTH, d_kv=6, d_ff=41, num_layers=2, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    OPTForCausalLM(opt).save_pretrained(root / "opt", max_shard_size="20KB")
    T5ForConditionalGeneration(t5).save_pretrained(root / "t5")
    assert len(list((root / "opt").glob("*.safetensors"))) > 1
    return {kind: str(root / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("ds") / "frozen.json"
    zero = {"stage": 1, "stage3_param_persistence_threshold": THRESHOLD, "reduce_bucket_size": 100_000}
    path.write_text(json.dumps({"zero_optimization": zero}))
    return str(path)


def on_two_ranks(rank: int, world_size: int, folders: dict[str, str], template: str) -> dict[str, Any]:
    context = LocalContext()
    return {kind: through_sharded(folder, template, context.rank) for kind, folder in folders.items()}


def through_sharded(folder: str, template: str, rank: Rank) -> dict[str, Any]:
    """Gradients through the sharded model; what the rank holds and has read; the guard over 50 steps."""
    store = ObjectStore()
    # These files are shorter than the first read of a header; so short a one makes the bytes read exact.
    safetensors_header.FIRST_READ_BYTES = safetensors_header.LENGTH_BYTES
    config = LanguageConfig(path=folder)
    language = load_frozen_lm(config, folder, store, rank, template)
    num_read = store.metrics.bytes_read
    bridge = Bridge(language)
    engine = make_engine(template, model=bridge)
    guard = FrozenGuard(language)
    x, tokens = batch()
    rows = range(rank.rank * ROWS // rank.world_size, (rank.rank + 1) * ROWS // rank.world_size)
    gradients, held = {}, 0
    for step in range(50):
        for row in rows:  # micro-batches of one
            engine.backward(bridge.loss(x[row : row + 1], {k: v[row : row + 1] for k, v in tokens.items()}))
        if step == 0:
            gradients = {n: p.grad.numpy() / rank.world_size for n, p in bridge.trainable_parameters().items()}
            held = sum(p.ds_tensor.nbytes + p.data.nbytes for p in language.parameters())
        assert engine.step(lr=1e-2).applied
    guard.check()
    if rank.rank == 1:  # the guard sees a change, on all ranks
        next(language.parameters()).ds_tensor[0] += 1
    with pytest.raises(TrainerError, match="frozen weights have changed"):
        guard.check()
    identity = frozen_identity(folder, store, rank)
    half = load_frozen_lm(LanguageConfig(path=folder, dtype="float16"), folder, store, rank, template)
    with pytest.raises(FrozenWeightsError, match=r"has shape .* the model needs"):
        load_frozen_lm(config, misshapen(folder, rank), store, rank, template)
    wide = {name for name, p in half.named_parameters() if p.ds_tensor.dtype is torch.float32}
    engine.close()
    return {"gradients": gradients, "held": held, "read": num_read, "identity": identity, "wide": wide}


def misshapen(folder: str, rank: Rank) -> str:
    """The same folder with one dimension of the vocabulary changed in config.json."""
    changed = Path(f"{folder}-changed-{rank.rank}")
    changed.mkdir()
    for path in Path(folder).iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"vocab_size": 98}))
    return str(changed)


@pytest.fixture(scope="module")
def sharded(folders: dict[str, str], template: str) -> list[dict[str, Any]]:
    return run_ranks(on_two_ranks, 2, folders, template)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_plain_torch_on_the_joined_batch(sharded: Any, folders: dict[str, str], kind: str) -> None:
    bridge = Bridge(load_language(LanguageConfig(path=folders[kind]), Path(folders[kind])))
    bridge.loss(*batch()).backward()
    for name, parameter in bridge.trainable_parameters().items():
        assert parameter.grad is not None
        ours = sum(torch.from_numpy(rank[kind]["gradients"][name]) for rank in sharded)
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-5, atol=1e-5 * float(parameter.grad.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_holds_and_reads_its_share(sharded: Any, folders: dict[str, str], kind: str) -> None:
    language = load_language(LanguageConfig(path=folders[kind]), Path(folders[kind]))
    parameters = list(language.parameters())
    share = sum(math.ceil(p.numel() / 2) * 4 for p in parameters)
    persistent = sum(p.nbytes for p in parameters if p.numel() <= THRESHOLD)
    headers = sum(8 + header_bytes(path) for path in Path(folders[kind]).glob("*.safetensors"))
    index = sum(path.stat().st_size for path in Path(folders[kind]).glob("*.index.json"))
    total = sum(p.nbytes for p in parameters)
    for rank in sharded:
        assert share <= rank[kind]["held"] <= share + persistent
        assert rank[kind]["read"] <= share + headers + index
    assert sum(rank[kind]["read"] for rank in sharded) == total + 2 * (headers + index)


def header_bytes(path: Path) -> int:
    return int(struct.unpack("<Q", path.read_bytes()[:8])[0])


def test_identity_is_that_of_one_process(sharded: Any, folders: dict[str, str]) -> None:
    for kind in KINDS:
        alone = frozen_identity(folders[kind], ObjectStore())
        assert {rank[kind]["identity"] for rank in sharded} == {alone}


def test_fp16_keeps_what_overflows_in_fp32(sharded: Any) -> None:
    """T5's wo; the rest is fp16."""
    assert sharded[0]["opt"]["wide"] == set()
    assert len(sharded[0]["t5"]["wide"]) == 4
    assert all(".wo." in name for name in sharded[0]["t5"]["wide"])
