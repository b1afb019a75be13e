"""A run as an operator reads it: one line, one row of a table, or everything."""

import time
from collections.abc import Iterator
from datetime import timedelta

from rich.table import Table
from rich.text import Text

from isthmus.cluster.status import Restart, RunState, RunStatus
from isthmus.cluster.submission.run_view import RunView

RESTARTS_SHOWN = 10
COLUMNS = ("run", "state", "stage", "step", "left", "workers", "images/s", "goodput", "restarts", "saved")
NUMBERS = ("step", "left", "workers", "images/s", "goodput", "restarts", "saved")
COLOURS = {"running": "green", "finished": "green", "failed": "red", "lost contact": "red", "waiting": "yellow"}


def line(view: RunView) -> str:
    """Return the run in one line."""
    status, why = view.status, _why(view)
    if status is None or not status.stage:
        return f"{view.run} {view.state}{f': {why}' if why else ''}"
    parts = [
        f"{view.run} {view.state} {status.stage} step {_progress(status)}",
        f"{_count(status.world_size, 'worker')}",
    ]
    figures = status.metrics
    if status.state is RunState.RUNNING and "samples_per_second" in figures:
        parts.append(f"{figures['samples_per_second']:.1f} images/s")
    if status.committed_step is not None:
        parts.append(f"saved at {status.committed_step}")
    if status.restarts:
        parts.append(_count(len(status.restarts), "restart"))
    if left := _left(status):
        parts.append(f"{left} left")
    return ", ".join(parts) + (f": {why}" if why else "")


def table(views: list[RunView]) -> Table:
    """Return one row per run."""
    found = Table(box=None, pad_edge=False)
    for column in COLUMNS:
        found.add_column(column, justify="right" if column in NUMBERS else "left", no_wrap=True)
    found.add_column("", overflow="fold")
    for view in views:
        found.add_row(*_row(view))
    return found


def details(view: RunView) -> Table:
    """Return everything that is known of one run, one thing a line."""
    found = Table(box=None, pad_edge=False, show_header=False)
    found.add_column(no_wrap=True)
    found.add_column(overflow="fold")
    job = f"  job {view.job.id}" if view.job else ""
    found.add_row(view.run, _state(view) + Text(f"{job}  {view.url}"))
    if why := _why(view):
        found.add_row("  note", why)
    for name, text in _facts(view.status) if view.status else ():
        found.add_row(f"  {name}", text)
    for restart in view.status.restarts[-RESTARTS_SHOWN:] if view.status else ():
        found.add_row("", _restart(restart))
    return found


def _facts(status: RunStatus) -> Iterator[tuple[str, str]]:
    """Yield name and text of what the driver last said."""
    figures = status.metrics
    if status.stage:
        left = _left(status)
        share = f" ({status.step / status.num_steps:.0%})" if status.num_steps else ""
        yield "progress", f"{status.stage}, step {_progress(status)}{share}" + (f", {left} left" if left else "")
    yield "workers", f"{status.world_size or 'none'}" + (f", attempt {status.attempt}" if status.attempt else "")
    is_training = status.state in (RunState.RUNNING, RunState.STOPPING)
    if is_training and "samples_per_second" in figures:
        wait = f", {figures['data_wait_fraction']:.0%} waiting for data" if "data_wait_fraction" in figures else ""
        yield "speed", f"{figures['samples_per_second']:.1f} images/s, {figures['seconds_per_step']:.2f} s a step{wait}"
    if "goodput" in figures:
        yield "goodput", f"{figures['goodput']:.1%} of all time spent on steps that count"
    saved = "none yet" if status.committed_step is None else f"step {status.committed_step}"
    age = figures.get("checkpoint_age_seconds")
    if age is not None and is_training:
        saved += f", {_seconds(age + time.time() - status.updated_at)} ago"
    yield "checkpoint", saved
    lost = sum(restart.lost_steps or 0 for restart in status.restarts)
    yield "restarts", f"{len(status.restarts)}" + (f", {_count(lost, 'step')} repeated in all" if lost else "")


def _row(view: RunView) -> tuple[str | Text, ...]:
    status = view.status
    if status is None:
        return (view.run, _state(view), *[""] * (len(COLUMNS) - 2), _why(view))
    figures = status.metrics
    return (
        view.run,
        _state(view),
        status.stage or "",
        _progress(status),
        _left(status),
        str(status.world_size or ""),
        f"{figures['samples_per_second']:.1f}" if "samples_per_second" in figures else "",
        f"{figures['goodput']:.1%}" if "goodput" in figures else "",
        str(len(status.restarts)),
        "none" if status.committed_step is None else str(status.committed_step),
        _why(view),
    )


def _restart(restart: Restart) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(restart.at))
    text = f"{when} {restart.stage} step {restart.step}, {_count(restart.world_size, 'worker')}: {restart.cause}"
    if restart.recovery_seconds is None:
        return text
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in restart.phases.items())
    repeated = _count(restart.lost_steps or 0, "step")
    return f"{text}; {repeated} repeated, trained again after {restart.recovery_seconds:.1f} s ({phases})"


def _state(view: RunView) -> Text:
    return Text(view.state, style=COLOURS.get(view.state, ""))


def _why(view: RunView) -> str:
    """Return why the run failed, waits or restarts; empty: nothing to say."""
    return view.failure or (view.current.message if view.current else "") or view.problem


def _progress(status: RunStatus) -> str:
    return f"{status.step}/{status.num_steps}"


def _left(status: RunStatus) -> str:
    eta = status.eta_seconds
    return "" if eta is None else str(timedelta(seconds=round(eta)))


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else str(timedelta(seconds=round(seconds)))


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
