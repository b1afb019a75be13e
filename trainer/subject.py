"""The subject of an evaluation: the newest checkpoint of a stage of a run, or an export, loaded on every rank."""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from isthmus.data_pipeline.config import DataConfig, SourceConfig
from isthmus.data_pipeline.reading.batch import TextEncoder
from isthmus.data_pipeline.store.object_store import NotFoundError, ObjectStore, join
from isthmus.model.formats.captioner import load_export
from isthmus.model.formats.native import DESCRIPTION
from isthmus.model.objectives.communicator import make_communicator
from isthmus.model.objectives.stage1 import Stage1Model
from isthmus.model.objectives.step import StepContext
from isthmus.model.text.qformer_tokenizer import LanguageEncoder
from isthmus.trainer.build import build_parts
from isthmus.trainer.checkpoint.format import step_name
from isthmus.trainer.checkpoint.reader import SavedCheckpoint, list_checkpoints
from isthmus.trainer.config.schema import EvaluationConfig, SafetyConfig, StageName, TrainConfig
from isthmus.trainer.context import Rank
from isthmus.trainer.engine.collectives import from_main_rank
from isthmus.trainer.engine.engine import Precision, build_engine
from isthmus.trainer.engine.process_group import process_group, select_device
from isthmus.trainer.errors import TrainerError
from isthmus.trainer.frozen.node_cache import folder_version, local_folder
from isthmus.trainer.stage1_task import Stage1Task
from isthmus.trainer.stage2_task import Stage2Task
from isthmus.trainer.task import Task

EXPORT_BATCH_SIZE = 16
RESULTS = "eval"
"""Folder of results below that of a run or of an export."""
RESULT, TEXTS = ".eval.json", ".eval.jsonl"
"""Suffixes of results and generated texts; they are not part of an export."""


@dataclass(frozen=True)
class Subject:
    """A loaded model, and with what it is measured."""

    url: str
    """Of the checkpoint or export."""
    task: Task
    encoder: TextEncoder
    precision: Precision
    data: DataConfig
    """How images are read; its sources are not."""
    evaluation: EvaluationConfig
    batch_size: int

    @property
    def side(self) -> int:
        """Side of the encoder's square images, in pixels."""
        side: int = self.task.model.vision.config.image_size_pixels
        return side


class Target(Protocol):
    """Something to evaluate, before it is loaded."""

    rank: Rank

    def process_group(self) -> AbstractContextManager[Any]:
        """Join the process group in which everything below happens."""
        ...

    def newest(self, stage: StageName | None) -> StageName:
        """Return a stage that has weights: the one given, or the last. Collective.

        Raises:
            TrainerError: there are none.
        """
        ...

    def identity(self, stage: StageName) -> str | None:
        """Return what changes when the stage's weights do; None if it has no such stage. Collective."""
        ...

    def results(self, stage: StageName) -> str:
        """Return the folder for results."""
        ...

    def open(self, stage: StageName) -> AbstractContextManager[Subject]:
        """Load a stage that has an identity. Collective."""
        ...


class RunTarget:
    """The newest checkpoints of a run."""

    def __init__(self, config: TrainConfig, url: str, store: ObjectStore, rank: Rank) -> None:
        """`config`: the run's; `url`: its folder."""
        self.rank = rank
        self._config, self._url, self._store = config, url, store
        self._saved: dict[StageName, SavedCheckpoint] = {}

    def process_group(self) -> AbstractContextManager[Any]:
        """Join the process group as the run's training does."""
        limit = self._config.safety.collective_timeout_seconds
        return process_group(self.rank, limit, deterministic=self._config.same_bits != "none")

    def newest(self, stage: StageName | None) -> StageName:
        """Return a stage that has a checkpoint: the one given, or the last."""
        for name in reversed(self._config.stages) if stage is None else (stage,):
            if self.identity(name):
                return name
        raise TrainerError(
            f"{self._url}: no committed checkpoint of {stage or 'any stage'}; give the folder that holds run.json"
        )

    def identity(self, stage: StageName) -> str | None:
        """Return the URL of the stage's newest checkpoint: rank 0's, for the run may be training."""
        if stage not in self._saved and stage in self._config.stages:
            found = list_checkpoints(join(self._url, stage, "checkpoints"), self._store)
            newest = from_main_rank(lambda: found[0].url if found else None)
            self._saved.update((stage, saved) for saved in found if saved.url == newest)
        return self._saved[stage].url if stage in self._saved else None

    def results(self, stage: StageName) -> str:
        """Return a folder of the checkpoint's."""
        return join(self._url, RESULTS, f"{stage}-{step_name(self._saved[stage].step)}")

    @contextmanager
    def open(self, stage: StageName) -> Iterator[Subject]:
        """Build the stage as for training and restore its checkpoint."""
        saved, config = self._saved[stage], self._config
        task, encoder = build_parts(config, stage, self.rank, self._store)
        engine = build_engine(task.model, config.stage(stage), self.rank)
        try:
            engine.restore(saved, saved.step)
            batch_size = config.stage(stage).global_batch_size
            yield Subject(saved.url, task, encoder, engine.precision, config.data, config.evaluation, batch_size)
        finally:
            engine.close()


class ExportTarget:
    """An export of either stage, or what `isthmus import` made of a published model; each rank loads all of it."""

    def __init__(self, url: str, store: ObjectStore, rank: Rank) -> None:
        """Raise TrainerError if the folder is not an export."""
        self.rank = rank
        self._url, self._store = url, store
        files = [info for info in store.list(url) if not info.url.startswith(f"{join(url, RESULTS)}/")]
        self._version, self.stage = folder_version(files), _stage_of(url, store)

    def process_group(self) -> AbstractContextManager[Any]:
        """Join a group of the ranks that torchrun started, or of one."""
        return process_group(self.rank, SafetyConfig().collective_timeout_seconds)

    def newest(self, stage: StageName | None) -> StageName:
        """Return the export's stage."""
        if stage not in (None, self.stage):
            raise TrainerError(f"{self._url}: an export of {self.stage}; for {stage} give an export of it, or a run")
        return self.stage

    def identity(self, stage: StageName) -> str | None:
        """Return the version of the export's files."""
        return self._version if stage == self.stage else None

    def results(self, stage: StageName) -> str:
        """Return a folder inside the export."""
        del stage
        return join(self._url, RESULTS)

    @contextmanager
    def open(self, stage: StageName) -> Iterator[Subject]:
        """Load the export, which is of that stage."""
        del stage
        device = select_device(self.rank)
        model, encoder = load_export(local_folder(self._url, self._store, leave_out=(RESULT, TEXTS)))
        context = StepContext(make_communicator(self.rank.world_size), EXPORT_BATCH_SIZE)
        task: Task
        if isinstance(model, Stage1Model):
            task = Stage1Task(model.to(device), context)
        else:
            assert isinstance(encoder, LanguageEncoder)
            task = Stage2Task(model.to(device), context, encoder)
        plain = DataConfig(sources=(SourceConfig(manifest=self._url),), lanes=self.rank.world_size)
        yield Subject(self._url, task, encoder, Precision(device), plain, EvaluationConfig(), EXPORT_BATCH_SIZE)


def _stage_of(url: str, store: ObjectStore) -> StageName:
    """Return the stage of a native export or of a BLIP-2 folder of transformers."""
    for name, is_stage1 in (
        (DESCRIPTION, lambda facts: facts.get("language") is None),
        ("config.json", lambda facts: facts.get("architectures") == ["Blip2ForImageTextRetrieval"]),
    ):
        try:
            return "stage1" if is_stage1(json.loads(store.get(join(url, name)))) else "stage2"
        except NotFoundError:
            continue
        except (ValueError, AttributeError) as error:
            raise TrainerError(f"{join(url, name)}: is damaged ({error}); export or import it again") from error
    raise TrainerError(
        f"{url}: holds neither config.yaml nor {DESCRIPTION} nor config.json; give the folder of a run "
        "(isthmus runs ls) or of an export"
    )
