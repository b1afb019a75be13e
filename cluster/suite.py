"""`isthmus eval RUN DATA --suite NAME`: a published protocol, task by task; results are stored next to the weights.

A result is one JSON file below the run or export, and the generated texts next to it. It names the weights, data and
the protocol it belongs to: while they are the same it is reused, so an interrupted suite resumes with the next task.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from isthmus.data_pipeline.dataset.manifest import Manifest
from isthmus.data_pipeline.errors import DataError, NotFoundError
from isthmus.data_pipeline.store.object_store import ObjectStore, join
from isthmus.model.objectives.communicator import make_communicator
from isthmus.model.text.qformer_tokenizer import LanguageEncoder, QFormerEncoder
from isthmus.trainer.config.schema import StageName
from isthmus.trainer.context import Rank
from isthmus.trainer.engine.collectives import from_main_rank
from isthmus.trainer.errors import TrainerError
from isthmus.trainer.evaluation.benchmark import Benchmark
from isthmus.trainer.evaluation.paper import beside_paper, model_names
from isthmus.trainer.evaluation.protocol import SUITES, EvalTask
from isthmus.trainer.evaluation.ranking import Ranking
from isthmus.trainer.evaluation.text_tasks import Row, TextTasks, caption_figures, question_figures
from isthmus.trainer.subject import RESULT, TEXTS, Subject, Target

STAGES: tuple[StageName, ...] = ("stage1", "stage2")
Progress = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
"""What is counted and how many there are -> a function that counts one more."""


@dataclass(frozen=True)
class TaskResult:
    """Figures of one task."""

    task: str
    weights: str
    """URL of the checkpoint, or version of the export."""
    data: str
    """Hash of the manifest."""
    settings: dict[str, Any]
    """Of the protocol."""
    models: tuple[str, str]
    """Encoder and language model by the names of the paper."""
    figures: dict[str, float]
    count: int
    """Images, or questions, that the figures are of."""

    def belongs_to(self, task: EvalTask, weights: str, data: str) -> bool:
        """Return whether the same evaluation would be made again."""
        return (self.task, self.weights, self.data, self.settings) == (task.name, weights, data, task.settings())


@dataclass
class SuiteReport:
    """Results of a suite, and why tasks have none."""

    results: list[TaskResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {"results": [asdict(result) for result in self.results], "notes": self.notes}

    def table(self) -> str:
        """Return the rows of the paper's tables, and the notes."""
        figures = {f"{r.task}/{name}": value for r in self.results for name, value in r.figures.items()}
        vision, language = (max((r.models[i] for r in self.results), default="") for i in (0, 1))
        return "\n".join([*beside_paper(figures, (vision, language)), *self.notes])


def evaluate_suite(
    target: Target, suite: str, data: str, store: ObjectStore, names: Sequence[str], progress: Progress
) -> SuiteReport:
    """Run the tasks of a suite that have no result yet. Collective; each rank has the whole report.

    Args:
        target: Run or export.
        suite: Name of the suite.
        data: Folder with one manifest per task, named as the task.
        store: Access to data and results.
        names: Tasks; None means all that the target's stages can do and that have a manifest.
        progress: Shows units of work on rank 0.

    Raises:
        TrainerError: a task is unknown, or one that was named cannot be done.
    """
    report = SuiteReport()
    with target.process_group():
        for stage in STAGES:
            tasks = [task for task in _tasks(suite, names) if task.stage == stage]
            _evaluate_stage(target, stage, _Work(tasks, data, store, progress), report, is_strict=bool(names))
    order = list(_by_name(suite))
    report.results.sort(key=lambda result: order.index(result.task))
    report.notes += filter(None, (_shortfall(_by_name(suite)[result.task], result) for result in report.results))
    return report


@dataclass(frozen=True)
class _Work:
    """Tasks of one stage, and what they need."""

    tasks: list[EvalTask]
    data: str
    store: ObjectStore
    progress: Progress


def _evaluate_stage(target: Target, stage: StageName, work: _Work, report: SuiteReport, *, is_strict: bool) -> None:
    weights = target.identity(stage)
    if weights is None:
        obstacles: dict[str, str] = {task.name: f"there are no weights of {stage}" for task in work.tasks}
        results: dict[str, TaskResult] = {}
    else:
        obstacles, results = from_main_rank(lambda: _what_is_there(target, stage, weights, work))
    notes = [f"{task}: not evaluated: {why}" for task, why in obstacles.items()]
    if notes and is_strict:
        raise TrainerError(notes[0])
    report.notes += notes
    report.results += results.values()
    pending = [task for task in work.tasks if task.name not in obstacles | results]
    if not pending or weights is None:
        return
    with target.open(stage) as subject:
        for task in pending:
            result, rows = _evaluate(subject, task, weights, work, target.rank)
            report.results.append(result)
            if target.rank.is_main:
                _keep(result, rows, target.results(stage), work.store)


def _what_is_there(
    target: Target, stage: StageName, weights: str, work: _Work
) -> tuple[dict[str, str], dict[str, TaskResult]]:
    """Return by task why it cannot be done, and the results that are of the same weights, data and protocol."""
    obstacles, results = {}, {}
    for task in work.tasks:
        try:
            data = Manifest.load(join(work.data, task.name), work.store).hash
        except DataError as error:
            if error.retryable:
                raise
            obstacles[task.name] = str(error)
            continue
        try:
            kept = TaskResult(**json.loads(work.store.get(_result_url(target.results(stage), task.name))))
        except (NotFoundError, ValueError, TypeError):  # there is none, or of an earlier release
            continue
        if kept.belongs_to(task, weights, data):
            results[task.name] = kept
    return obstacles, results


def _evaluate(subject: Subject, task: EvalTask, weights: str, work: _Work, rank: Rank) -> tuple[TaskResult, list[Row]]:
    """Return a task's result and the generated texts. Collective."""
    model, precision, rows = subject.task.model, subject.precision, []
    data = Benchmark(join(work.data, task.name), work.store, subject.side, rank)
    with work.progress(task.name, -(-data.num_units // rank.world_size)) as on_unit:
        if task.kind == "retrieval":
            words, communicator = cast(QFormerEncoder, subject.encoder), make_communicator(rank.world_size)
            figures, count = Ranking(model, words, precision, communicator, data, on_unit).figures()
        else:
            texts = TextTasks(model, cast(LanguageEncoder, subject.encoder), precision, data, on_unit)
            is_caption = task.kind == "caption"
            rows = texts.captions() if is_caption else texts.answers()
            figures = caption_figures(rows, data.url) if is_caption else question_figures(rows, task, data.url)
            count = len(rows)
    return TaskResult(task.name, weights, data.hash, task.settings(), model_names(model), figures, count), rows


def _keep(result: TaskResult, rows: Sequence[Row], folder: str, store: ObjectStore) -> None:
    """Write the texts, then the result that says they are whole."""
    texts = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    store.put(join(folder, f"{result.task}{TEXTS}"), texts.encode())
    store.put(_result_url(folder, result.task), json.dumps(asdict(result), indent=1).encode())


def _result_url(folder: str, task: str) -> str:
    return join(folder, f"{task}{RESULT}")


def _shortfall(task: EvalTask, result: TaskResult) -> str | None:
    """Return a note where the figures are not of the whole published split."""
    if result.count == task.published:
        return None
    what = "questions" if task.kind == "question" else "images"
    return f"{task.name}: {result.count:,} {what}, the published split has {task.published:,}"


def _by_name(suite: str) -> dict[str, EvalTask]:
    if suite not in SUITES:
        raise TrainerError(f"--suite {suite} is unknown; choose one of {', '.join(SUITES)}")
    return {task.name: task for task in SUITES[suite]}


def _tasks(suite: str, names: Sequence[str]) -> list[EvalTask]:
    by_name = _by_name(suite)
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise TrainerError(f"--task {unknown[0]} is unknown; {suite} has {', '.join(by_name)}")
    return [task for task in by_name.values() if task.name in names or not names]
