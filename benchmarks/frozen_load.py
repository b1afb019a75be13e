"""Load a deep random language model of about 1 GB on two ranks: own loader against HfDeepSpeedConfig + from_pretrained.

Every figure is per rank. `anonymous peak` is the growth of RssAnon over the time of loading, sampled every 2 ms.
Run: OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.frozen_load
"""

import json
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.model.config import LanguageConfig
from isthmus.trainer.context import LocalContext
from tests.ranks import run_ranks

LAYERS, WIDTH, VOCABULARY = 80, 512, 8192
TEMPLATE = {
    "zero_optimization": {"stage": 1, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 1000000}
}
LIMIT_SECONDS = 900.0


def make_model(folder: Path) -> None:
    """Write a random OPT of LAYERS layers, whose embedding is a small share."""
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, word_embed_proj_dim=WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=8, ffn_dim=4 * WIDTH, max_position_embeddings=512,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(folder)


class Watched:
    """Wall and CPU seconds, growth of anonymous memory and bytes read by a call."""

    def __init__(self, load: Callable[[], Any]) -> None:
        start, read = _status("RssAnon"), _bytes_read()
        peak, done = [start], threading.Event()

        def sample() -> None:
            while not done.wait(0.002):
                peak[0] = max(peak[0], _status("RssAnon"))

        thread = threading.Thread(target=sample)
        thread.start()
        wall, cpu = time.monotonic(), time.process_time()
        self.model = load()
        self.figures = {"wall seconds": time.monotonic() - wall, "CPU seconds": time.process_time() - cpu}
        done.set()
        thread.join()
        self.figures["anonymous peak MB"] = (max(peak[0], _status("RssAnon")) - start) / 1e6
        self.figures["anonymous after MB"] = (_status("RssAnon") - start) / 1e6
        self.figures["read calls MB"] = (_bytes_read() - read) / 1e6


def own(_rank: int, _world_size: int, folder: str, template: str) -> dict[str, float]:
    """Load with `load_frozen_lm`."""
    import isthmus.model.frozen.language  # noqa: F401 - imported ahead, as it is for the peer
    from isthmus.trainer.engine.deepspeed_workarounds import drain_gloo
    from isthmus.trainer.frozen.zero3 import load_frozen_lm

    context, store = LocalContext(), ObjectStore()
    config = LanguageConfig(path=folder)
    watched = Watched(lambda: load_frozen_lm(config, folder, store, context.rank, template))
    watched.figures["read calls MB"] = store.metrics.bytes_read / 1e6
    watched.figures["partition MB"] = sum(p.ds_tensor.nbytes for p in watched.model.parameters()) / 1e6
    watched.figures["largest tensor MB"] = max(p.ds_numel * 4 for p in watched.model.parameters()) / 1e6
    drain_gloo()
    return watched.figures


def peer(_rank: int, _world_size: int, folder: str, template: str) -> dict[str, float]:
    """Load as transformers documents it for ZeRO-3."""
    from isthmus.trainer.engine.deepspeed_config import frozen_config
    from isthmus.trainer.engine.deepspeed_workarounds import drain_gloo, load_deepspeed
    from isthmus.trainer.frozen.zero3 import return_freed_memory

    return_freed_memory()
    load_deepspeed()
    from transformers import OPTForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    holder = HfDeepSpeedConfig(frozen_config(template))
    watched = Watched(lambda: OPTForCausalLM.from_pretrained(folder))
    assert holder is not None
    watched.figures["partition MB"] = sum(p.ds_tensor.nbytes for p in watched.model.parameters()) / 1e6
    drain_gloo()
    return watched.figures


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _bytes_read() -> int:
    """Bytes asked for by read calls; mapped files are not counted."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def main() -> None:
    """Print the figures of both loaders and their ratios as JSON."""
    with tempfile.TemporaryDirectory() as root:
        folder, template = Path(root) / "model", Path(root) / "template.json"
        make_model(folder)
        template.write_text(json.dumps(TEMPLATE))
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        results = {
            name: run_ranks(load, 2, str(folder), str(template), timeout_seconds=LIMIT_SECONDS)
            for name, load in (("own", own), ("from_pretrained", peer))
        }
    slowest = {name: max(rank["wall seconds"] for rank in ranks) for name, ranks in results.items()}
    busiest = {name: sum(rank["CPU seconds"] for rank in ranks) for name, ranks in results.items()}
    print(json.dumps({"model MB": size / 1e6, **results}, indent=1))
    print(f"wall ratio {slowest['from_pretrained'] / slowest['own']:.1f}")
    print(f"CPU ratio {busiest['from_pretrained'] / busiest['own']:.1f}")


if __name__ == "__main__":
    main()
