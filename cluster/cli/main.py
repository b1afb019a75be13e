"""Entry point of `isthmus`: mounts the commands and turns expected errors into one red line and exit code 2."""

import importlib
import sys
from typing import NoReturn

import typer

from isthmus.cluster.cli import (
    bootstrap,
    checkpoints,
    checks,
    config,
    data,
    jobs,
    model,
    planning,
    runs,
    train,
)
from isthmus.cluster.errors import EXPECTED_ERRORS

USAGE_ERROR = 2

app = typer.Typer(
    name="isthmus",
    help="Pretrain BLIP-2 vision-language bridges on a Ray cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 a bug in isthmus, 2 an error for you to fix, 75 stopped early: run it again.",
)
for verbs in (train.app, jobs.app, model.app, checks.app, planning.app, runs.report_app):
    app.add_typer(verbs)
app.add_typer(config.app, name="config")
app.add_typer(data.app, name="data")
app.add_typer(runs.app, name="runs")
app.add_typer(checkpoints.app, name="checkpoints")
app.add_typer(bootstrap.app, name="bootstrap")
app.add_typer(train.assets_app, name="assets")
app.add_typer(model.models_app, name="models")


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of every error (anywhere on the line)."),
) -> None:
    """Pretrain BLIP-2 vision-language bridges on a Ray cluster."""


def main() -> NoReturn:
    """Run the command line; never returns."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        app(args=arguments, prog_name="isthmus", standalone_mode=True)
    except EXPECTED_ERRORS as error:
        if debug:
            raise
        _fail(str(error))
    sys.exit(0)


def _fail(message: str) -> NoReturn:
    console = importlib.import_module("rich.console").Console(stderr=True, soft_wrap=True)
    console.print(message, style="red", markup=False, highlight=False)
    sys.exit(USAGE_ERROR)


if __name__ == "__main__":
    main()
