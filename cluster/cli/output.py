"""Output of commands: JSON for programs, tables and progress for people."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import typer

if TYPE_CHECKING:
    from rich.table import Table

PLAIN_WIDTH = 240
"""Columns of what goes into a file or a pipe, where nothing should be wrapped."""
PLAIN_LINE_SECONDS = 10.0


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    typer.echo(json.dumps(value, indent=2))


def print_rich(renderable: Any) -> None:
    """Print a table or text of Rich: in the terminal's width and colours, or wide and plain elsewhere."""
    from rich.console import Console

    if sys.stdout.isatty():
        Console(highlight=False).print(renderable)
        return
    console = Console(width=PLAIN_WIDTH, highlight=False)
    with console.capture() as capture:
        console.print(renderable)
    typer.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))  # Rich fills lines with spaces


def table(columns: Sequence[str] | None, rows: Iterable[Sequence[Any]]) -> "Table":
    """Return a table without borders; a column whose name ends in `>` is aligned to the right and never wraps."""
    from rich.table import Table

    rows = list(rows)
    names = columns or [""] * max(map(len, rows), default=0)
    found = Table(box=None, pad_edge=False, show_header=columns is not None)
    for name in names:
        is_number = name.endswith(">")
        justify: Literal["right", "left"] = "right" if is_number else "left"
        found.add_column(name.removesuffix(">"), justify=justify, no_wrap=is_number, overflow="fold")
    for row in rows:
        found.add_row(*row)
    return found


def duration(seconds: float) -> str:
    """Return a duration in its two largest units, such as `3 d 4 h`, `5 min 20 s` or `12 s`."""
    left = round(seconds)
    parts: list[str] = []
    for name, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        number, left = divmod(left, size)
        if number or parts or name == "s":
            parts.append(f"{number} {name}")
    return " ".join(part for part in parts[:2] if len(parts) == 1 or not part.startswith("0 "))


def data_size(num_bytes: float) -> str:
    """Return a number of bytes as people read it, such as `1.20 GB`, `3.4 MB` or `81 kB`."""
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:.2f} GB"
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.0f} kB"


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
