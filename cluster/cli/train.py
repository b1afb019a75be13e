"""`isthmus train`: a run on this machine. `isthmus eval`: measure it. `isthmus assets`: inputs without a download."""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from isthmus.cluster.cli.options import (
    AllowChangeOption,
    EndpointOption,
    JsonOption,
    OverridesArg,
    RecipeArg,
    RegionOption,
    open_store,
)
from isthmus.cluster.cli.output import print_json, progress
from isthmus.cluster.config import JobConfig
from isthmus.trainer.config.loading import load_config

if TYPE_CHECKING:
    from isthmus.cluster.suite import Progress
    from isthmus.data_pipeline.store.object_store import ObjectStore
    from isthmus.trainer.subject import Target

app = typer.Typer()
assets_app = typer.Typer(help="Generate inputs that need no download.", no_args_is_help=True)

LocalOption = Annotated[
    bool, typer.Option("--local", help="Train in this process, without Ray: for debugging, or one GPU.")
]
SUBJECT_HELP = "Folder of a run or of an export (local or s3://)."
SubjectArg = Annotated[str, typer.Argument(metavar="RUN_OR_FOLDER", help=SUBJECT_HELP)]
DATA_HELP = "Manifest of held-out pairs, .jsonl of questions about images, or folder of a suite's manifests."
HeldOutArg = Annotated[str, typer.Argument(help=DATA_HELP)]
TasksOption = Annotated[list[str] | None, typer.Option("--task", help="Run only this task of the suite (repeatable).")]
OUT_HELP = "Local folder for report.json and gallery.png (default: eval)."
ReportOption = Annotated[Path | None, typer.Option("--out", help=OUT_HELP)]
STAGE_HELP = "stage1 or stage2 (default: the last with any)"
StageOption = Annotated[Literal["stage1", "stage2"] | None, typer.Option("--stage", help=STAGE_HELP)]


@app.command()
def train(
    config: RecipeArg,
    overrides: OverridesArg = None,
    local: LocalOption = False,
    allow_change: AllowChangeOption = None,
) -> None:
    """Train a run on this machine, or resume it; the first Ctrl-C saves a checkpoint and stops."""
    from isthmus.cluster.submission.input_paths import check_present

    resolved = load_config(config, overrides or [], JobConfig)
    check_present(resolved)
    if local:
        from isthmus.trainer.run_local import train_here

        log_to_terminal()
        raise typer.Exit(train_here(resolved, allow_change=allow_change or []).exit_code)
    from isthmus.cluster.driver import run_local

    raise typer.Exit(run_local(resolved, allow_change or []).exit_code)


@app.command("eval")
def evaluate(
    run: SubjectArg,
    data: HeldOutArg,
    suite: Annotated[str | None, typer.Option("--suite", help="Published protocol: blip2.")] = None,
    tasks: TasksOption = None,
    out: ReportOption = None,
    stage: StageOption = None,
    num_samples: Annotated[int | None, typer.Option("--samples", help="Samples evaluated (default: recipe's)")] = None,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure retrieval (stage 1), captions and answers (stage 2) of a run's newest checkpoint, or of an export."""
    from isthmus.cluster.evaluate import Report
    from isthmus.cluster.evaluate import evaluate as measure
    from isthmus.cluster.suite import SuiteReport, evaluate_suite

    if (suite and (out or stage or num_samples)) or (tasks and not suite):
        raise typer.BadParameter("--task goes with --suite; --out, --stage and --samples go without: a suite is fixed")
    log_to_terminal(logging.WARNING)
    target, store = _target(
        run.rstrip("/"), open_store(endpoint_url, region), is_store_given=bool(endpoint_url or region)
    )
    out = out or Path("eval")
    report: SuiteReport | Report
    if suite:
        report = evaluate_suite(target, suite, data.rstrip("/"), store, tasks or [], _progress(target.rank.is_main))
    else:
        report = measure(target, data, out, store, stage=stage, num_samples=num_samples)
    if not target.rank.is_main:
        return
    if as_json:
        print_json(report.as_json())
    else:
        typer.echo(report.table())
    if not suite:
        typer.echo(f"{out / 'report.json'}  {out / 'gallery.png'}", err=True)


@assets_app.command()
def tiny(
    folder: Annotated[Path, typer.Argument(help="Local folder to create.")] = Path("assets/tiny"),
    train: Annotated[int, typer.Option(help="Training pairs.")] = 2000,
    held_out: Annotated[int, typer.Option(help="Held-out pairs.")] = 96,
) -> None:
    """Generate scenes and tiny random frozen models, the inputs of recipes/tiny.yaml and bootstrap-demo.yaml."""
    from isthmus.demo.tiny.assets import write_tiny_assets

    write_tiny_assets(folder, train, held_out)
    typer.echo(f"{folder}: {train} training and {held_out} held-out pairs, vision encoder, vocabulary, OPT, T5")
    typer.echo("  isthmus train recipes/tiny.yaml --local")


def _target(url: str, store: "ObjectStore", *, is_store_given: bool) -> "tuple[Target, ObjectStore]":
    """Return a run or an export, and the store by which it is read: that of the run unless options say otherwise."""
    from isthmus.data_pipeline.store.object_store import NotFoundError, ObjectStore, join
    from isthmus.trainer.config.loading import check_config, parse_yaml
    from isthmus.trainer.context import LocalContext
    from isthmus.trainer.subject import ExportTarget, RunTarget

    rank, config_url = LocalContext().rank, join(url, "config.yaml")
    try:
        text = store.get(config_url).decode()
    except NotFoundError:
        return ExportTarget(url, store, rank), store
    config = check_config(parse_yaml(text, config_url), JobConfig, config_url)
    if is_store_given:
        config = config.model_copy(update={"store": store.config})
    store = ObjectStore(config.store)
    return RunTarget(config, url, store, rank), store


def _progress(is_main: bool) -> "Progress":
    """Return what shows the progress of a task on rank 0."""

    @contextlib.contextmanager
    def show(task: str, units: int) -> Iterator[Callable[[], None]]:
        if not is_main:
            yield lambda: None
            return
        with progress(f"units of {task}", units) as advance:
            yield advance

    return show


def log_to_terminal(level: int = logging.INFO) -> None:
    """Send log lines to standard error, with the time on a terminal."""
    pattern = "%(asctime)s %(message)s" if sys.stderr.isatty() else "%(message)s"
    logging.basicConfig(level=level, format=pattern, datefmt="%H:%M:%S", stream=sys.stderr, force=True)
