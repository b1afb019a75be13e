"""The inputs of recipes/tiny.yaml: a small indexed corpus and random frozen models."""

import os
from pathlib import Path

from isthmus.data_pipeline.dataset.index_build import IndexOptions, build_manifest
from isthmus.data_pipeline.process_pool import run_in_processes
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.demo.tiny.scenes import KINDS, make_scene, write_shards
from isthmus.model.frozen.vision import silent_transformers
from isthmus.model.tiny import write_tiny_language, write_tiny_vision, write_tiny_vocabulary

CAPTIONS_READ = 4000
CHUNK_BYTES = 64 << 10


def write_tiny_assets(folder: Path, num_train: int, num_held_out: int) -> None:
    """Write shards and manifests, a vision encoder, a WordPiece vocabulary, an OPT and a T5.

    Splits: `train`, `held-out`, and for bootstrapping captions `clean`, a tenth as many, and `noisy`, of whose captions
    30% are exchanged.
    """
    folder = folder.resolve()  # shards stand in the manifest by their full path
    texts = [make_scene(0, "train", number)[0].caption for number in range(CAPTIONS_READ)]
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports DeepSpeed, which would say that it looked
    with silent_transformers():
        write_tiny_vision(folder / "vision")
        write_tiny_vocabulary(folder / "bert", texts)
        for kind in ("opt", "t5"):
            write_tiny_language(folder / kind, kind)
    write_corpus(folder, "train", num_train)
    write_corpus(folder, "held-out", num_held_out, unique=True, kinds=("one",))
    write_corpus(folder, "clean", max(1, num_train // 10))
    write_corpus(folder, "noisy", num_train, exchanged=0.3)


def write_corpus(
    folder: Path,
    split: str,
    num_samples: int,
    *,
    kinds: tuple[str, ...] = KINDS,
    unique: bool = False,
    exchanged: float = 0.0,
) -> str:
    """Write a split's shards and index them; return the URL of its manifest."""
    shards = write_shards(folder / "shards", split, num_samples, kinds=kinds, unique=unique, exchanged=exchanged)
    manifest = str(folder / split)
    build_manifest(
        [str(shard) for shard in shards], manifest, ObjectStore(), IndexOptions(CHUNK_BYTES), run_in_processes(1)
    )
    return manifest
