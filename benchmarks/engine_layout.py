"""Stage 2 with one DeepSpeed engine (everything ZeRO-3) or two (language model ZeRO-3, trainable part ZeRO-1).

Two gloo ranks, random OPT, a trainable transformer in front. Per rank, after warm-up: CPU seconds, collectives and the
bytes in them per step, peak growth of anonymous memory.
Run: OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.engine_layout
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.frozen_load import Watched
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.model.config import LanguageConfig
from isthmus.trainer.context import LocalContext
from tests.engine_toys import make_engine
from tests.ranks import run_ranks

WIDTH, LAYERS, HEAD_WIDTH, STEPS = 256, 4, 256, 3
ZERO = {"stage3_param_persistence_threshold": 1000, "reduce_bucket_size": 5000000, "overlap_comm": False}


class Bridge(nn.Module):
    """A small transformer and a projection in front of a language model."""

    def __init__(self, language: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(HEAD_WIDTH, 4, 4 * HEAD_WIDTH, dropout=0.0, batch_first=True)
        self.head = nn.TransformerEncoder(layer, 4)
        self.projection = nn.Linear(HEAD_WIDTH, WIDTH)
        self.language = language

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """All but the language model's."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def forward(self, x: Tensor, tokens: dict[str, Tensor]) -> Tensor:
        """Return the language model's loss."""
        loss: Tensor = self.language(self.projection(self.head(x)), tokens)
        return loss


def make_model(folder: Path) -> None:
    """Write the random language model."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=2000, hidden_size=WIDTH, word_embed_proj_dim=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4,
        ffn_dim=4 * WIDTH, max_position_embeddings=128, dropout=0.0,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(folder)


def measure(rank: int, _world_size: int, folder: str, layout: str) -> dict[str, Any]:
    """Train a few steps in one layout."""
    from isthmus.trainer.engine.deepspeed_workarounds import drain_gloo
    from isthmus.trainer.frozen.zero3 import load_frozen_lm

    torch.set_num_threads(1)
    template = Path(folder) / f"{layout}.json"
    template.write_text(json.dumps({"zero_optimization": {"stage": 1, **ZERO}}))
    language = load_frozen_lm(LanguageConfig(path=folder), folder, ObjectStore(), LocalContext().rank, str(template))
    bridge = Bridge(language)
    ids = torch.randint(5, 1900, (4, 16), generator=torch.Generator().manual_seed(rank))
    x, tokens = torch.ones(4, 8, HEAD_WIDTH), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    backward, step, close = _two(bridge, str(template)) if layout == "two engines" else _one(bridge, language)

    def run() -> None:
        for _ in range(STEPS):
            for row in range(2):
                part = slice(2 * row, 2 * row + 2)
                backward(bridge(x[part], {name: t[part] for name, t in tokens.items()}))
            step()

    run()
    with Collectives() as counted:
        run()
    watched = Watched(run)
    close()
    drain_gloo()
    return {
        "CPU seconds per step": watched.figures["CPU seconds"] / STEPS,
        "wall seconds per step": watched.figures["wall seconds"] / STEPS,
        "collectives per step": counted.calls / STEPS,
        "collective MB per step": counted.bytes / STEPS / 1e6,
        "anonymous peak MB": watched.figures["anonymous peak MB"],
    }


def _two(bridge: Bridge, template: str) -> Any:
    engine = make_engine(template, model=bridge)
    return engine.backward, lambda: engine.step(1e-4), engine.close


def _one(bridge: Bridge, language: Any) -> Any:
    """Take the language model's own hooks off and put everything under one ZeRO-3 engine."""
    from isthmus.trainer.engine.deepspeed_config import trainable_config
    from isthmus.trainer.engine.deepspeed_workarounds import load_deepspeed

    language.partitioning.destroy()
    template = Path(tempfile.mkdtemp()) / "one.json"
    template.write_text(json.dumps({"zero_optimization": {"stage": 3, **ZERO, "memory_efficient_linear": False}}))
    trainable = list(bridge.trainable_parameters().values())
    config = trainable_config(str(template))
    engine, *_ = load_deepspeed().initialize(model=bridge, optimizer=torch.optim.AdamW(trainable), config=config)
    stack: list[Any] = []

    def backward(loss: Tensor) -> None:
        if not stack:
            stack.append(engine.coalesce_grad_reduction())
            stack[0].__enter__()
        engine.backward(loss)

    def step() -> None:
        stack.pop().__exit__(None, None, None)
        engine.step()

    return backward, step, engine.destroy


class Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's class is not annotated
    """Counts the collectives that start while it is active, and the bytes of the larger side of each."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; count it where it is one of c10d."""
        if func.namespace == "c10d" and "barrier" not in str(func):
            self.calls += 1
            self.bytes += max(_bytes(arg) for arg in args)
        return func(*args, **(kwargs or {}))


def _bytes(arg: Any) -> int:
    if isinstance(arg, Tensor):
        return arg.nbytes
    return sum(map(_bytes, arg)) if isinstance(arg, list | tuple) else 0


def main() -> None:
    """Print both layouts as JSON, rank 0 first."""
    with tempfile.TemporaryDirectory() as root:
        make_model(Path(root))
        results = {
            layout: run_ranks(measure, 2, root, layout, timeout_seconds=200) for layout in ("two engines", "one")
        }
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
