"""`isthmus train`: a run on this machine. `isthmus eval`: measure it. `isthmus assets`: inputs without a download."""

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Literal

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
from isthmus.cluster.config import JobConfig
from isthmus.trainer.config.loading import load_config

app = typer.Typer()
assets_app = typer.Typer(help="Make inputs that need no download.", no_args_is_help=True)

LocalOption = Annotated[
    bool, typer.Option("--local", help="Train in this process, without Ray: for debugging, or one GPU.")
]


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
    run: Annotated[
        str, typer.Argument(metavar="RUN_OR_FOLDER", help="Folder of a run or of a stage-2 export (local or s3://).")
    ],
    data: Annotated[str, typer.Argument(help="Manifest of held-out pairs, or a .jsonl of questions about images.")],
    out: Annotated[Path, typer.Option("--out", help="Local folder for report.json and gallery.png.")] = Path("eval"),
    stage: Annotated[
        Literal["stage1", "stage2"] | None,
        typer.Option("--stage", help="stage1 or stage2 (default: the last with any)"),
    ] = None,
    num_samples: Annotated[int | None, typer.Option("--samples", help="Samples evaluated (default: recipe's)")] = None,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure retrieval (stage 1), captions and answers (stage 2) of a run's newest checkpoint, or of an export."""
    from isthmus.data_pipeline.store.object_store import NotFoundError, join
    from isthmus.trainer.config.loading import check_config, parse_yaml
    from isthmus.trainer.evaluate import evaluate_export, evaluate_run

    log_to_terminal(logging.WARNING)
    folder = run.rstrip("/")
    url, store = join(folder, "config.yaml"), open_store(endpoint_url, region)
    try:
        text = store.get(url).decode()
    except NotFoundError:
        report = evaluate_export(folder, data, out, store, num_samples=num_samples)
    else:
        config = check_config(parse_yaml(text, url), JobConfig, url)
        config = config.model_copy(update={"store": store.config}) if endpoint_url or region else config
        report = evaluate_run(config, folder, data, out, stage=stage, num_samples=num_samples)
    typer.echo(json.dumps(report.as_json(), indent=2) if as_json else report.table())
    typer.echo(f"{out / 'report.json'}  {out / 'gallery.png'}", err=True)


@assets_app.command()
def tiny(
    folder: Annotated[Path, typer.Argument(help="Local folder that is made.")] = Path("assets/tiny"),
    train: Annotated[int, typer.Option(help="Training pairs.")] = 2000,
    held_out: Annotated[int, typer.Option(help="Held-out pairs.")] = 96,
) -> None:
    """Write generated scenes and tiny random frozen models: what recipes/tiny.yaml and bootstrap-demo.yaml read."""
    from isthmus.demo.tiny.assets import write_tiny_assets

    write_tiny_assets(folder, train, held_out)
    typer.echo(f"{folder}: {train} training and {held_out} held-out pairs, vision encoder, vocabulary, OPT, T5")
    typer.echo("  isthmus train recipes/tiny.yaml --local")


def log_to_terminal(level: int = logging.INFO) -> None:
    """Send log lines to standard error, with the time on a terminal."""
    pattern = "%(asctime)s %(message)s" if sys.stderr.isatty() else "%(message)s"
    logging.basicConfig(level=level, format=pattern, datefmt="%H:%M:%S", stream=sys.stderr, force=True)
