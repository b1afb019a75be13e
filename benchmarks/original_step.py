"""The original BLIP-2 code's stage-1 step (salesforce-lavis 1.0.2), in the peers' environment: see stage1_original.py.

    .cache/peers/bin/python benchmarks/original_step.py < requests

Each line of standard input is answered with the CPU seconds of one step, forward and backward. The image encoder is
replaced by given features, the tokenizer by given ids; everything between them is the package's own code, in training
mode with its dropout of 0.1. Modules that the step does not use, and their dependencies, are not imported.
"""

import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn

WIDTH, PATCHES, QUERIES, TOKENS = 1408, 257, 32, 32
LENGTHS = (14, 16, 8, 16, 9, 11, 8, 16)
BERT_VOCABULARY, CLS, PAD, BOS = 30522, 101, 0, 30522


def stand_in(name: str, folder: Path | None = None, **names: object) -> None:
    """Put a module in place of one that the step does not need; with `folder`, a package without its `__init__`."""
    module = ModuleType(name)
    module.__dict__.update(names, **({"__path__": [str(folder)]} if folder else {}))
    sys.modules[name] = module


def import_original() -> tuple[type, type, type]:
    """Return the classes of the stage-1 model, of its Q-Former and of the Q-Former's configuration."""
    package = next(Path(path) / "lavis" for path in sys.path if (Path(path) / "lavis" / "models").exists())
    for name in ("", ".common", ".models", ".models.blip_models"):
        stand_in(f"lavis{name}", package / name[1:].replace(".", "/"))
    registry = SimpleNamespace(register_model=lambda _: lambda model: model)
    stand_in("lavis.common.registry", registry=registry)
    stand_in("lavis.common.dist_utils", download_cached_file=None, is_dist_avail_and_initialized=dist.is_initialized)
    stand_in("lavis.common.utils", get_abs_path=None, is_url=None)
    stand_in("lavis.common.logger", MetricLogger=None)
    stand_in("lavis.models.eva_vit", create_eva_vit_g=None)
    stand_in("lavis.models.clip_vit", create_clip_vit_L=None)
    stand_in("omegaconf", OmegaConf=None)
    from lavis.models.blip2_models.blip2_qformer import Blip2Qformer
    from lavis.models.blip2_models.Qformer import BertConfig, BertLMHeadModel

    return Blip2Qformer, BertLMHeadModel, BertConfig


class Ids(SimpleNamespace):
    """What the model asks its tokenizer for, whatever the text."""

    bos_token_id, pad_token_id = BOS, PAD

    def __call__(self, *_: object, **__: object) -> "Ids":
        """Return the ids of any text."""
        return self

    def to(self, _: object) -> "Ids":
        """Stay on the CPU."""
        return self


def build() -> nn.Module:
    """Build the model as its `__init__` does, without downloads."""
    model_class, qformer_class, config_class = import_original()
    config = config_class(encoder_width=WIDTH, add_cross_attention=True, cross_attention_freq=2, query_length=QUERIES)
    model = model_class.__new__(model_class)
    nn.Module.__init__(model)
    model.visual_encoder, model.ln_vision = nn.Identity(), nn.LayerNorm(WIDTH)
    model.Qformer = qformer_class(config)
    model.Qformer.resize_token_embeddings(BERT_VOCABULARY + 1)
    model.query_tokens = nn.Parameter(config.initializer_range * torch.randn(1, QUERIES, config.hidden_size))
    model.vision_proj, model.text_proj = nn.Linear(config.hidden_size, 256), nn.Linear(config.hidden_size, 256)
    model.itm_head = nn.Linear(config.hidden_size, 2)
    model.temp = nn.Parameter(torch.tensor(0.07))
    model.max_txt_len = TOKENS
    mask = torch.arange(TOKENS) < torch.tensor(LENGTHS)[:, None]
    ids = torch.randint(1000, 30000, (len(LENGTHS), TOKENS)).masked_fill(~mask, PAD)
    ids[:, 0] = CLS
    model.tokenizer = Ids(input_ids=ids, attention_mask=mask.long())
    return model.train()


def main() -> None:
    """Answer each line of standard input with the CPU seconds of a step."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model, images = build(), torch.randn(len(LENGTHS), PATCHES, WIDTH)
    for _ in sys.stdin:
        model.zero_grad(set_to_none=True)
        began = time.process_time()
        model({"image": images, "text_input": None}).loss.backward()
        print(time.process_time() - began, flush=True)


if __name__ == "__main__":
    main()
