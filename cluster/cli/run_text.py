"""A run as an operator reads it: one line, one row of a table, or everything. Tables fit 100 columns."""

import time
from collections.abc import Iterator

from rich.console import Group
from rich.table import Table
from rich.text import Text

from isthmus.cluster.cli.output import duration, table
from isthmus.cluster.status import Restart, RunState, RunStatus
from isthmus.cluster.submission.run_view import RunView

RESTARTS_SHOWN = 10
COLUMNS = ("run", "state", "progress", "left>", "workers>", "images/s>", "goodput>", "restarts>", "saved>")
COLOURS = {"running": "green", "finished": "green", "failed": "red", "lost contact": "red", "waiting": "yellow"}
STARTING = (RunState.STARTING, RunState.RESTARTING)


def line(view: RunView) -> str:
    """Return the run in one line."""
    status, why = view.status, _note(view)
    if status is None or not status.stage:
        return f"{view.run} {view.state}{f': {why}' if why else ''}"
    parts = [f"{view.run} {view.state} {_progress(status)}", _count(status.world_size, "worker")]
    figures = status.metrics
    if status.state is RunState.RUNNING and "samples_per_second" in figures:
        parts.append(f"{figures['samples_per_second']:.1f} images/s")
    if status.committed_step is not None:
        parts.append(f"saved at {status.committed_step}")
    if status.num_restarts:
        parts.append(_count(status.num_restarts, "restart"))
    if left := _left(status):
        parts.append(f"{left} left")
    return ", ".join(parts) + (f": {why}" if why else "")


def overview(views: list[RunView]) -> Group:
    """Return one row per run, and below the table what a row cannot hold: why a run waits, starts or has failed."""
    notes = [Text(f"{view.run}: {why}") for view in views if (why := _note(view))]
    return Group(table(COLUMNS, map(_row, views)), *notes)


def details(view: RunView) -> Table:
    """Return everything that is known of one run, one thing a line."""
    rows: list[tuple[str, str | Text]] = [(view.run, _state(view)), ("folder", view.url)]
    if view.job:
        rows.append(("job", view.job.id))
    if why := _note(view):
        rows.append(("note", why))
    if view.status:
        rows += _facts(view.status)
        rows += [("", _restart(restart)) for restart in view.status.restarts[-RESTARTS_SHOWN:]]
    return table(None, rows)


def _facts(status: RunStatus) -> Iterator[tuple[str, str]]:
    """Yield name and text of what the driver last reported."""
    figures = status.metrics
    if status.stage:
        left = _left(status)
        share = f" ({status.step / status.num_steps:.0%})" if status.num_steps else ""
        yield "progress", f"{_progress(status)}{share}" + (f", {left} left" if left else "")
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
        saved += f", {duration(age + time.time() - status.updated_at)} ago"
    yield "checkpoint", saved
    lost = status.lost_steps
    yield "restarts", f"{status.num_restarts}" + (f", {_count(lost, 'step')} repeated in all" if lost else "")


def _row(view: RunView) -> tuple[str | Text, ...]:
    status = view.status
    if status is None:
        return (view.run, _state(view), *[""] * (len(COLUMNS) - 2))
    figures = status.metrics
    return (
        view.run,
        _state(view),
        _progress(status) if status.stage else "",
        _left(status),
        str(status.world_size or ""),
        f"{figures['samples_per_second']:.1f}" if "samples_per_second" in figures else "",
        f"{figures['goodput']:.1%}" if "goodput" in figures else "",
        str(status.num_restarts),
        "none" if status.committed_step is None else str(status.committed_step),
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


def _note(view: RunView) -> str:
    """Return why the run failed, waits, starts or restarts; empty: there is nothing to say."""
    status = view.current
    why = view.failure or (status.message if status else "") or view.problem
    if status and status.phase and status.state in STARTING and not view.is_over:
        seconds = max(0.0, time.time() - status.phase_began_at)
        return "; ".join(part for part in (why, f"{status.phase}, {duration(seconds)}") if part)
    return why


def _progress(status: RunStatus) -> str:
    return f"{status.stage} {status.step}/{status.num_steps}"


def _left(status: RunStatus) -> str:
    eta = status.eta_seconds
    return "" if eta is None else duration(eta)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
