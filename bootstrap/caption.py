"""The first stage: candidate captions for every image, in addition to the data set's own texts.

A caption is a function of (manifest, key, model, seed): every candidate is sampled with its own seed, and batches are
the shard's samples in order, padded to a fixed size, so neither the number of workers nor a kill changes a byte.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar

import pyarrow as pa

from isthmus.bootstrap.config import CaptionConfig
from isthmus.bootstrap.models import folder_identity, load_writer
from isthmus.bootstrap.samples import ImageBatch, read_batches
from isthmus.bootstrap.stage import ShardDone, ShardTask
from isthmus.data_pipeline.dataset.manifest import Manifest
from isthmus.data_pipeline.hashing import stable_hash
from isthmus.data_pipeline.layers.candidates import WEB, candidate_table
from isthmus.data_pipeline.layers.layer import LayerWriter
from isthmus.data_pipeline.store.object_store import ObjectStore, join

CAPTIONS = "captions"
"""Folder of the stage's layer."""
NOT_CAPTIONED = "not captioned"


@dataclass(frozen=True)
class CaptionShard:
    """Writes the candidates of one shard; picklable."""

    stage: ClassVar[str] = "caption"
    writer: LayerWriter
    store: ObjectStore
    config: CaptionConfig
    origin: tuple[str, str]
    """Hashes of manifest and model."""

    def __call__(self, task: ShardTask) -> ShardDone:
        """Caption the images of a shard and commit its table.

        Raises:
            DataError, ModelError, TrainerError: see `run_stage`.
        """
        config, done, rows = self.config, ShardDone(task), _Rows(self.config.name)
        model = load_writer(config.model, self.store.config)
        counts: Counter[str] = Counter()
        for batch in read_batches(task.shard, self.store, [model.image_input], config.batch_size):
            seeds = [self._seeds(task.number, key) for key in batch.keys]
            padding = [[0] * config.num_candidates] * (config.batch_size - len(seeds))
            with done.in_model(len(seeds)):
                written = model.write(batch.images[0], seeds + padding, config.decoding)
            rows.add(batch, written, seeds if config.method == "nucleus" else None)
            counts.update(_counts(batch))
        self.writer.write(task.number, task.shard, rows.table(), counts)
        return done

    def _seeds(self, shard: int, key: str) -> list[int]:
        """Return a signed 64-bit seed for each candidate."""
        parts = ("candidate", *self.origin, shard, key, self.config.seed)
        hashes = (stable_hash(*parts, place) for place in range(self.config.num_candidates))
        return [value - (1 << 64) if value >> 63 else value for value in hashes]


def caption_work(manifest: Manifest, out: str, config: CaptionConfig, store: ObjectStore) -> CaptionShard:
    """Return the stage that captions a data set; it is identified by a hash of the model's files.

    Raises:
        DataError: the model folder contains no model.
    """
    model = folder_identity(config.model, store)
    made_by = {"stage": CaptionShard.stage, **config.model_dump(mode="json"), "model": model}
    writer = LayerWriter(join(out, CAPTIONS), manifest.hash, made_by, store)
    return CaptionShard(writer, store, config, (manifest.hash, model))


@dataclass
class _Rows:
    """Collects the table of a shard."""

    name: str
    keys: list[str] = field(default_factory=list)
    texts: list[list[str]] = field(default_factory=list)
    sources: list[list[str]] = field(default_factory=list)
    seeds: list[list[int | None]] = field(default_factory=list)

    def add(self, batch: ImageBatch, written: list[list[str]], seeds: list[list[int]] | None) -> None:
        """Add the samples of a batch; a sample without a usable image keeps its own texts and gets no candidates."""
        for place, key in enumerate(batch.keys):
            own, first = batch.texts[place], dict[str, int]()
            for number, text in enumerate(written[place] if batch.errors[place] is None else ()):
                if text:
                    first.setdefault(text, number)  # equal candidates count once
            drawn = [seeds[place][number] if seeds else None for number in first.values()]
            self.keys.append(key)
            self.texts.append([*own, *first])
            self.sources.append([WEB] * len(own) + [self.name] * len(first))
            self.seeds.append([*([None] * len(own)), *drawn])

    def table(self) -> pa.Table:
        """Return the table as the layer stores it."""
        return candidate_table(self.keys, self.texts, self.sources, self.seeds)


def _counts(batch: ImageBatch) -> Counter[str]:
    """Count the samples, and by cause those that could not be captioned."""
    counts = Counter({"images": len(batch.keys)})
    counts.update(f"{NOT_CAPTIONED}: {error.partition(':')[0]}" for error in batch.errors if error)
    return counts
