"""Frozen models of the real sizes with random weights, made on the device, and the recipe that trains on them."""

import json
from pathlib import Path

import torch
from transformers import Blip2VisionConfig, Blip2VisionModel, OPTConfig, OPTForCausalLM

from isthmus.cluster.config import JobConfig
from isthmus.data_pipeline.reading.batch import Batch, TextEncoder
from isthmus.model.imports.towers import preprocessor
from isthmus.model.tiny import write_tiny_tokenizer
from isthmus.trainer.config.loading import load_config
from isthmus.trainer.estimate.architectures import bundled_config

RECIPE = Path(__file__).parents[2] / "recipes" / "blip2-vitg-opt2.7b.yaml"
TINY_VISION = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
               "image_size": 28, "patch_size": 14}  # fmt: skip
TINY_LANGUAGE = {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "word_embed_proj_dim": 64, "max_position_embeddings": 128}  # fmt: skip
TINY_QFORMER = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 128, "num_queries": 8,
                "max_positions": 64, "projection_size": 32}  # fmt: skip
VOCABULARY = 30522
CAPTION_WORDS = (4, 14)


def vision_folder(scratch: Path, *, tiny: bool) -> Path:
    """Write EVA-CLIP ViT-g/14 in bf16 (2 GB), once."""
    folder = scratch / "vision"
    if not (folder / "config.json").exists():
        fields = TINY_VISION if tiny else bundled_config("eva-clip-vit-g-14")
        config = Blip2VisionConfig(**{key: value for key, value in (fields or {}).items() if key != "model_type"})
        torch.manual_seed(1)
        with torch.device(_device()):
            network = Blip2VisionModel(config).to(torch.bfloat16)
        network.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor(config.image_size)))
    return folder


def language_folder(scratch: Path, *, tiny: bool) -> Path:
    """Write OPT-2.7B in bf16 (5.3 GB), once, with a small tokenizer of the tests."""
    folder = scratch / "opt"
    if not (folder / "config.json").exists():
        fields = TINY_LANGUAGE if tiny else bundled_config("opt-2.7b")
        config = OPTConfig(**{key: value for key, value in (fields or {}).items() if key != "model_type"})
        torch.manual_seed(2)
        with torch.device(_device()):
            model = OPTForCausalLM(config).to(torch.bfloat16)
        write_tiny_tokenizer(folder, "opt")
        model.save_pretrained(folder)
    return folder


def vocabulary_folder(scratch: Path) -> Path:
    """Write a WordPiece vocabulary of BERT's size: its special tokens and made-up words."""
    folder = scratch / "bert"
    folder.mkdir(parents=True, exist_ok=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [f"w{i}" for i in range(VOCABULARY - len(special))]
    (folder / "vocab.txt").write_text("\n".join(special + words) + "\n")
    return folder


def recipe(scratch: Path, rows: int, *, tiny: bool, overrides: tuple[str, ...] = ()) -> JobConfig:
    """Return the recipe of ViT-g and OPT-2.7B for one GPU with `rows` rows a step in one micro-batch."""
    settings = {
        "run.url": scratch / "runs",
        "data.lanes": rows,
        "data.backend": "process",
        "cluster.workers": "{min: 1, max: 1, gpus: 0}",
        "model.vision.path": vision_folder(scratch, tiny=tiny),
        "model.language.path": language_folder(scratch, tiny=tiny),
        "model.qformer.init_from": "null",
        "model.qformer.tokenizer": vocabulary_folder(scratch),
        **{
            f"{stage}.{key}": rows
            for stage in ("stage1", "stage2")
            for key in ("global_batch_size", "micro_batch_size")
        },
    }
    if tiny:
        settings |= {"model.vision.image_size_pixels": TINY_VISION["image_size"]}
        settings |= {f"model.qformer.{key}": value for key, value in TINY_QFORMER.items()}
    return load_config(RECIPE, [*(f"{key}={value}" for key, value in settings.items()), *overrides], JobConfig)


def batch_of(step: int, rows: int, image_size: int, encoder: TextEncoder) -> Batch:
    """Return a batch as the loader makes it: pageable uint8 pixels, channels last in memory, random captions."""
    generator = torch.Generator().manual_seed(100 + step)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    lengths = draw(*CAPTION_WORDS, rows).tolist()
    captions = [" ".join(f"w{word}" for word in draw(0, 5000, length).tolist()) for length in lengths]
    images_BHWC = draw(0, 256, rows, image_size, image_size, 3).to(torch.uint8)
    return Batch(
        step=step,
        rows_B=torch.arange(rows),
        valid_B=torch.ones(rows, dtype=torch.bool),
        images_BCHW=images_BHWC.permute(0, 3, 1, 2),
        flip_B=draw(0, 2, rows).bool(),
        tokens=encoder(captions, list(range(rows))),
        captions=captions,
        keys=[str(row) for row in range(rows)],
        image_ids_B=torch.arange(rows) + rows * step,
        positions=[(0, 0, row) for row in range(rows)],
    )


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
