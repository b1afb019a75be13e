"""How verbs print: JSON for programs, tables and progress for people."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import typer

PLAIN_WIDTH = 240
"""Columns of what goes into a file or a pipe, where nothing should be wrapped."""
PLAIN_LINE_SECONDS = 10.0


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    typer.echo(json.dumps(value, indent=2))


def print_rich(renderable: Any) -> None:
    """Print a table or text of Rich: in the terminal's width and colours, or wide and plain elsewhere."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False).print(renderable)


@contextlib.contextmanager
def progress(unit: str, total: int | None) -> Iterator[Callable[[], None]]:
    """Yield a function that counts one more: a bar on a terminal, a line every 10 s elsewhere (on stderr)."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        with Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
            task = bar.add_task(unit, total=total)
            yield lambda: bar.advance(task)
        return
    done, shown = 0, time.monotonic()

    def advance() -> None:
        nonlocal done, shown
        done += 1
        if done == total or time.monotonic() - shown >= PLAIN_LINE_SECONDS:
            shown = time.monotonic()
            typer.echo(f"{done}{f' of {total}' if total else ''} {unit}", err=True)

    yield advance
