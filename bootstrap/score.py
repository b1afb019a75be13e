"""The second stage: scores of every candidate and of the data set's own texts; nothing is dropped before `select`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from isthmus.bootstrap.caption import CAPTIONS
from isthmus.bootstrap.config import ScoreConfig
from isthmus.bootstrap.models import folder_identity, load_judge
from isthmus.bootstrap.samples import ImageBatch, read_batches
from isthmus.bootstrap.stage import ShardDone, ShardTask
from isthmus.bootstrap.text_scores import SCORES, knows_language, text_scores
from isthmus.data_pipeline.config import DataConfig
from isthmus.data_pipeline.dataset.manifest import Manifest
from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.layers.candidates import add_scores
from isthmus.data_pipeline.layers.layer import Layer, LayerWriter
from isthmus.data_pipeline.sample.captions import clean_caption
from isthmus.data_pipeline.store.object_store import ObjectStore, join
from isthmus.model.captioning.judges import Judge

SCORED = "scores"
"""Folder of the stage's layer."""
MAX_WORDS = int(DataConfig.model_fields["max_caption_words"].default)
Values = list[list[float | None]]
"""For each sample a value per candidate; None where the image cannot be used."""


@dataclass(frozen=True)
class ScoreShard:
    """Adds the scores to one shard's candidates; picklable."""

    stage: ClassVar[str] = "score"
    writer: LayerWriter
    store: ObjectStore
    config: ScoreConfig
    candidates: Layer

    def __call__(self, task: ShardTask) -> ShardDone:
        """Score the candidates of a shard and commit its table.

        Raises:
            DataError, ModelError, TrainerError: see `run_stage`.
        """
        done = ShardDone(task)
        table = self.candidates.read(task.number)
        texts: list[list[str]] = table["texts"].to_pylist()
        scores = self._of_texts(texts) | self._of_pairs(task, texts, done)
        self.writer.write(task.number, task.shard, add_scores(table, scores))
        return done

    def _of_texts(self, texts: list[list[str]]) -> dict[str, Values]:
        found = [[text_scores(text, self.config.language) for text in row] for row in texts]
        return {name: [[scores[name] for scores in row] for row in found] for name in SCORES}

    def _of_pairs(self, task: ShardTask, texts: list[list[str]], done: ShardDone) -> dict[str, Values]:
        """Return the models' scores of the shard's images and texts."""
        judges = [load_judge(url, self.store.config) for url in self.config.models]
        scores: dict[str, Values] = {name: [] for judge in judges for name in judge.scores}
        if not judges:
            done.images = len(texts)
            return scores
        inputs, first = [judge.image_input for judge in judges], 0
        for batch in read_batches(task.shard, self.store, inputs, self.config.batch_size):
            rows = texts[first : first + len(batch.keys)]
            with done.in_model(len(rows)):
                found = _judged(judges, batch, rows, self.config.batch_size)
            for name, values in found.items():
                scores[name] += values
            first += len(rows)
        return scores


def score_work(manifest: Manifest, out: str, config: ScoreConfig, store: ObjectStore) -> ScoreShard:
    """Return the stage that scores what `caption` wrote; it is identified by hashes of the models' files.

    Raises:
        DataError: there are no captions, they belong to another manifest, a folder contains no model, or the
            language is unknown.
    """
    if not knows_language(config.language):
        raise DataError(f"language {config.language!r} is unknown; give its ISO 639 code, such as en, de or zh")
    candidates = Layer.load(join(out, CAPTIONS), store)
    candidates.check_base(manifest)
    models = [folder_identity(url, store) for url in config.models]
    made_by = {"stage": ScoreShard.stage, **config.model_dump(mode="json"), "models": models}
    writer = LayerWriter(join(out, SCORED), manifest.hash, made_by, store, candidates.hash)
    return ScoreShard(writer, store, config, candidates)


def _judged(judges: Sequence[Judge], batch: ImageBatch, rows: list[list[str]], size: int) -> dict[str, Values]:
    """Return each score of a batch of fixed shape: padded with images, and each image with as many texts."""
    # Texts are scored as training reads them.
    cleaned = [[clean_caption(text, MAX_WORDS) for text in row] for row in rows]
    width = max(1, *map(len, cleaned))
    padded = [row + [""] * (width - len(row)) for row in cleaned] + [[""] * width] * (size - len(rows))
    scores: dict[str, Values] = {}
    for judge, images_BHWC in zip(judges, batch.images, strict=True):
        for name, values_BK in judge.score(images_BHWC, padded).items():
            values = values_BK.tolist()
            scores[name] = [
                [None] * len(row) if error else values[place][: len(row)]
                for place, (row, error) in enumerate(zip(rows, batch.errors, strict=True))
            ]
    return scores
