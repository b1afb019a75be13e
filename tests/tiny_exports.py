"""Tiny random exports of both stages, and a data set with images that cannot be used: what bootstrapping works on."""

import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from isthmus.data_pipeline.dataset.index_build import IndexOptions, build_manifest
from isthmus.data_pipeline.process_pool import run_in_processes
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.model.config import LanguageConfig, QFormerConfig, VisionConfig
from isthmus.model.formats.native import export_bridge
from isthmus.model.frozen.language import load_language
from isthmus.model.frozen.vision import load_vision
from isthmus.model.objectives.stage1 import Stage1Model
from isthmus.model.objectives.stage2 import Stage2Model
from isthmus.model.qformer.qformer import QFormer
from isthmus.model.tiny import write_tiny_language, write_tiny_vision, write_tiny_vocabulary
from tests.corpus import write_tar

SIDE_PIXELS = 32
COLOURS = ("red", "green", "blue")
BROKEN = 5
"""Number of the sample whose image is no image."""


def write_exports(folder: Path) -> tuple[Path, Path]:
    """Write a captioner (stage 2) and a filter (stage 1); return their folders."""
    vision = VisionConfig(path="vision", image_size_pixels=SIDE_PIXELS)
    language = LanguageConfig(path="opt", max_text_tokens=24)
    write_tiny_vision(folder / "vision", width=32, num_layers=1, side_pixels=SIDE_PIXELS)
    write_tiny_language(folder / "opt", "opt")
    size = write_tiny_vocabulary(folder / "bert", [f"a {colour} picture number" for colour in COLOURS])
    qformer = QFormerConfig(
        hidden_size=32, num_layers=2, num_heads=4, intermediate_size=64, num_queries=4, vocab_size=size + 1,
        max_positions=32, dropout=0.0, projection_size=16,
    )  # fmt: skip
    encoder = load_vision(vision, folder / "vision")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stage1 = Stage1Model(encoder, QFormer(qformer, encoder.width))
        bridge = QFormer(qformer, encoder.width, with_text=False)
        stage2 = Stage2Model(encoder, bridge, load_language(language, folder / "opt"))
        with torch.no_grad():
            stage2.projection.weight.normal_(std=0.5)  # so that the picture decides what a random model writes
    frozen = (vision, folder / "vision")
    export_bridge(folder / "captioner", stage2.trainable_parameters(), qformer, frozen, (language, folder / "opt"))
    export_bridge(folder / "filter", stage1.trainable_parameters(), qformer, frozen, tokenizer=folder / "bert")
    return folder / "captioner", folder / "filter"


def write_pictures(folder: Path, samples_per_shard: list[int], *, broken: bool = True) -> str:
    """Write shards of coloured noise and index them; return the URL of the manifest."""
    number, shards = 0, []
    for shard, count in enumerate(samples_per_shard):
        members = [member for i in range(number, number + count) for member in _members(i, broken=broken)]
        shards.append(write_tar(folder / "shards" / f"{shard:05d}.tar", members))
        number += count
    options = IndexOptions(chunk_bytes=4096)
    build_manifest(
        [str(path) for path in shards], str(folder / "manifest"), ObjectStore(), options, run_in_processes(1)
    )
    return str(folder / "manifest")


def _members(number: int, *, broken: bool) -> list[tuple[str, bytes]]:
    colour = number % len(COLOURS)
    pixels = np.random.default_rng(number).integers(0, 120, (40, 36, 3), dtype=np.uint8)
    pixels[:, :, colour] += 120
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    data = file.getvalue()
    # The header stays readable, so that indexing takes the sample.
    data = data[: len(data) // 2] if broken and number == BROKEN else data
    texts = [f"a {COLOURS[colour]} picture", f"number {number}"][: 1 + number % 2]
    return [(f"{number:04d}.jpg", data), (f"{number:04d}.json", json.dumps({"captions": texts}).encode())]
