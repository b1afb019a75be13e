"""Text views of a run: one line, one row of a table, or all details. Tables fit 100 columns."""

import time
from collections.abc import Iterator

from rich.console import Group
from rich.table import Table
from rich.text import Text

from isthmus.cluster.cli.output import duration, table
from isthmus.cluster.status import Restart, RunState, RunStatus
from isthmus.cluster.submission.run_view import RunView

RESTARTS_SHOWN = 10
TIMED_RESTARTS = 6
"""As many columns fit."""
COLUMNS = ("run", "state", "progress", "left>", "workers>", "img/s>", "restarts>", "saved>")
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


def details(view: RunView) -> Group:
    """Return all that is known of a run, one fact per line, and the time of its restarts by phase."""
    rows: list[tuple[str, str | Text]] = [(view.run, _state(view)), ("folder", view.url)]
    if view.job:
        rows.append(("job", view.job.id))
    if why := _why(view):
        rows.append(("note", why))
    if phase := _phase(view):
        rows.append(("phase", phase))
    if view.status:
        rows += _facts(view.status, is_over=view.is_over)
        rows += [("", _restart(restart)) for restart in view.status.restarts[-RESTARTS_SHOWN:]]
    timed = [restart for restart in view.status.restarts if restart.phases] if view.status else []
    facts = table(None, rows)
    return Group(facts, Text(), _phases(timed[-TIMED_RESTARTS:])) if timed else Group(facts)


def _facts(status: RunStatus, *, is_over: bool) -> Iterator[tuple[str, str]]:
    """Yield name and text of what the driver last reported."""
    figures = status.metrics
    if status.stage:
        left = _left(status)
        share = f" ({status.step / status.num_steps:.1%})" if status.num_steps else ""
        yield "progress", f"{_progress(status)}{share}" + (f", {left} left" if left else "")
    if not is_over:
        yield "workers", f"{status.world_size or 'none'}" + (f", attempt {status.attempt}" if status.attempt else "")
    is_training = status.state in (RunState.RUNNING, RunState.STOPPING)
    if is_training and "samples_per_second" in figures:
        wait = f", {figures['data_wait_fraction']:.0%} waiting for data" if "data_wait_fraction" in figures else ""
        yield "speed", f"{figures['samples_per_second']:.1f} images/s, {figures['seconds_per_step']:.2f} s a step{wait}"
    if figures.get("cost"):
        yield "cost", f"{figures['cost']:.2f} since this start of the stage"
    if "goodput" in figures:
        yield "goodput", f"{figures['goodput']:.1%} of all time spent on steps that count"
    saved = "none yet" if status.committed_step is None else f"step {status.committed_step}"
    age = figures.get("checkpoint_age_seconds")
    if age is not None and is_training:
        saved += f", {duration(age + time.time() - status.updated_at)} ago"
    yield "checkpoint", saved
    if status.spares or status.lost_spares:
        yield "spares", f"{status.spares} ready" + (f", {status.lost_spares} lost" if status.lost_spares else "")
    if status.damaged_copies:
        yield "node caches", f"{_count(status.damaged_copies, 'damaged entry')}, read from the store again"
    lost = status.lost_steps
    yield "restarts", f"{status.num_restarts}" + (f", {_count(lost, 'step')} repeated in all" if lost else "")


def _row(view: RunView) -> tuple[str | Text, ...]:
    status = view.status
    if status is None:
        return (view.run, _state(view), *[""] * (len(COLUMNS) - 2))
    speed = status.metrics.get("samples_per_second") if status.state is RunState.RUNNING else None
    return (
        view.run,
        _state(view),
        _progress(status) if status.stage else "",
        _left(status),
        "" if view.is_over else str(status.world_size or ""),
        "" if speed is None else f"{speed:.1f}" if speed < 1000 else f"{speed:.0f}",
        str(status.num_restarts),
        "none" if status.committed_step is None else str(status.committed_step),
    )


def _restart(restart: Restart) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(restart.at))
    text = f"{when} {restart.stage} step {restart.step}, {_count(restart.world_size, 'worker')}: {restart.cause}"
    if restart.recovery_seconds is None:
        return text
    repeated = _count(restart.lost_steps or 0, "step")
    return f"{text}; {repeated} repeated, trained again after {restart.recovery_seconds:.1f} s"


def _phases(restarts: list[Restart]) -> Table:
    """Return the time of restarts by phase, one column each, in seconds, and the origin of the processes."""
    names = list(dict.fromkeys(name for restart in restarts for name in restart.phases))
    rows = [[name, *(_seconds(restart.phases.get(name)) for restart in restarts)] for name in names]
    rows.append(["all", *(_seconds(sum(restart.phases.values())) for restart in restarts)])
    sources = dict.fromkeys(name for restart in restarts for name in restart.processes)
    rows += [[f"{name} processes", *(str(restart.processes.get(name, "")) for restart in restarts)] for name in sources]
    at = [time.strftime("%H:%M:%S", time.gmtime(restart.at)) for restart in restarts]
    return table(["restart", *(f"{text}>" for text in at)], rows)


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.2f}"


def _state(view: RunView) -> Text:
    return Text(view.state, style=COLOURS.get(view.state, ""))


def _note(view: RunView) -> str:
    """Return why the run failed, waits or restarts, and the phase of its start; empty: there is nothing to say."""
    return "; ".join(part for part in (_why(view), _phase(view)) if part)


def _why(view: RunView) -> str:
    return view.failure or (view.current.message if view.current else "") or view.problem


def _phase(view: RunView) -> str:
    """Return the phase of the start and for how long it has lasted; empty: the run is not starting."""
    status = view.current
    if status is None or not status.phase or status.state not in STARTING or view.is_over:
        return ""
    return f"{status.phase}, {duration(max(0.0, time.time() - status.phase_began_at))}"


def _progress(status: RunStatus) -> str:
    return f"{status.stage} {status.step}/{status.num_steps}"


def _left(status: RunStatus) -> str:
    eta = status.eta_seconds
    return "" if eta is None else duration(eta)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
