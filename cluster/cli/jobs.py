"""`isthmus submit|status|logs|stop|resume|ls`: runs on a Ray cluster."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.cluster.cli.config import AllowChange, ConfigPath, Json, Overrides
from isthmus.cluster.config import JobConfig
from isthmus.cluster.errors import ClusterError, last_line
from isthmus.trainer.config.loading import check_config, load_config, parse_yaml
from isthmus.trainer.context import Outcome

if TYPE_CHECKING:
    from isthmus.cluster.submission.jobs import Job, Jobs
    from isthmus.cluster.submission.run_view import RunView
    from isthmus.data_pipeline.store.object_store import ObjectStore

app = typer.Typer()

FIRST_SIGN_SECONDS = 10.0
WATCH_SECONDS = 2.0
INTERRUPTED = 130
PROGRESS_SECONDS = 30.0
SILENCE_SECONDS = 60.0
PLAIN_WIDTH = 240
"""Columns of what goes into a file or a pipe, where nothing shall be wrapped."""
ADDRESS_HELP = "Dashboard of the cluster, such as http://HOST:8265 [default: RAY_ADDRESS, else this machine's]."
Address = Annotated[str | None, typer.Option("--address", help=ADDRESS_HELP)]
Run = Annotated[str, typer.Argument(metavar="RUN", help="Name of a run on the cluster, or URL of its folder.")]
Watch = Annotated[bool, typer.Option("--watch", help="Go on showing the state until the run ends.")]


@app.command()
def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Address = None,
    watch: Watch = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and show what would be sent; send nothing.")
    ] = False,
    allow_change: AllowChange = None,
) -> None:
    """Submit a run to a Ray cluster; one that is already at work is left as it is."""
    resolved = load_config(config, overrides or [], JobConfig)
    if dry_run:
        _show_dry_run(resolved)
    else:
        _submit(resolved, address or resolved.cluster.address, watch=watch, allow_change=allow_change or [])


@app.command()
def resume(run: Run, address: Address = None, watch: Watch = False) -> None:
    """Go on with a run from its last committed checkpoint; by URL also on another cluster."""
    from isthmus.data_pipeline.store.object_store import ObjectStore

    if is_url(run):
        resolved = stored_config(run.rstrip("/"), ObjectStore())
        _submit(resolved, address or resolved.cluster.address, watch=watch)
        return
    job = open_jobs(address).latest(run)
    _submit(stored_config(job.run_url, ObjectStore(job.store)), address, watch=watch)


@app.command()
def status(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="Run or URL of its folder; none: all runs.")
    ] = None,
    address: Address = None,
    watch: Watch = False,
    as_json: Json = False,
) -> None:
    """Show state, stage, step, time left, workers, goodput, restarts and the last committed checkpoint."""
    if watch and not as_json:
        _watch(lambda: _views(run, address))
    else:
        _show(_views(run, address), one=run is not None, as_json=as_json)


@app.command()
def ls(address: Address = None, as_json: Json = False) -> None:
    """List the runs that the cluster knows, newest first."""
    _show(_views(None, address), one=False, as_json=as_json)


@app.command()
def logs(
    run: Run,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
    rank: Annotated[int | None, typer.Option("--rank", help="Only lines of this rank.")] = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Print the log of a run's newest job."""
    from isthmus.cluster.logs import parse_line, render_line

    jobs = open_jobs(address)
    job = jobs.latest(run)
    found = False
    for text in jobs.follow(job) if follow else iter(jobs.logs(job).splitlines()):
        line = parse_line(text)
        if rank is not None and (line is None or line.get("rank") != rank):
            continue
        found = True
        if as_json:
            typer.echo(json.dumps(line or {"message": text}))
        else:
            typer.echo(render_line(line) if line else text)
    if rank is not None and not found:
        typer.echo(f"{run}: the log of job {job.id} has no line of rank {rank}", err=True)


@app.command()
def stop(
    run: Run,
    address: Address = None,
    grace_seconds: Annotated[
        float, typer.Option("--grace", help="Longest wait for the checkpoint, in seconds.")
    ] = 180.0,
) -> None:
    """Save a checkpoint at the next step boundary, then end the run; `isthmus resume` goes on."""
    jobs = open_jobs(address)
    job = jobs.latest(run)
    if job.is_over:
        typer.echo(f"{run}: not at work ({job.status.lower()})")
        return
    typer.echo(f"{run}: saving a checkpoint, then stopping", err=True)
    job = jobs.stop(job, grace_seconds)
    view = _view(job)
    saved = view.status.committed_step if view.status else None
    typer.echo(f"{run}: {job.status.lower()}" + (f", checkpoint at step {saved}" if saved is not None else ""))
    typer.echo(f"  isthmus resume {run}{_option(address)}")


def _submit(config: JobConfig, address: str | None, *, watch: bool, allow_change: Sequence[str] = ()) -> None:
    jobs = open_jobs(address)
    _check_against_run(config, allow_change)
    job, is_new = jobs.submit(config, allow_change)
    name = config.run.name
    typer.echo(f"{name}: {'submitted' if is_new else 'already at work'} as job {job.id} at {jobs.address}")
    if is_new and not _report_full_cluster(jobs, config):
        _report_first_sign(jobs, job)
    for verb in (f"status {name} --watch", f"logs -f {name}", f"stop {name}", f"resume {name}"):
        typer.echo(f"  isthmus {verb}{_option(address)}")
    if watch:
        ended = _watch(lambda: [_view(jobs.get(job.id))])[0]
        _fail_if_failed(ended)
        if ended.state != "finished":
            raise typer.Exit(Outcome.STOPPED.exit_code)


def _check_against_run(config: JobConfig, allow_change: Sequence[str]) -> None:
    """Refuse at once what the driver would refuse, where the run's folder can be read from here."""
    from isthmus.cluster.submission.run_view import impatient
    from isthmus.data_pipeline.errors import DataError
    from isthmus.trainer.runs.store import check_config_of_run

    with suppress(DataError, OSError):
        check_config_of_run(config, impatient(config.store), allow_change)


def _report_full_cluster(jobs: "Jobs", config: JobConfig) -> bool:
    """Say what is lacking where no allowed group fits at the moment; return whether that is so."""
    from isthmus.cluster.supervision.resource_request import ResourceRequest, largest_world_size, shortfall

    request = ResourceRequest.of(config)
    free, total = jobs.resources()
    if largest_world_size(config.world_sizes, request, free) is not None:
        return False
    text = shortfall(min(config.world_sizes), request, free, total)
    typer.secho(f"{config.run.name}: waiting: {text}; add nodes, end other jobs, or lower cluster.workers", err=True)
    return True


def _report_first_sign(jobs: "Jobs", job: "Job") -> None:
    """Wait some seconds for the driver's first word; raise its error, print what it waits for."""
    from isthmus.cluster.status import RunState

    deadline = time.monotonic() + FIRST_SIGN_SECONDS
    while time.monotonic() < deadline:
        view = _view(jobs.get(job.id))
        _fail_if_failed(view)
        status = view.current
        if status and status.state is RunState.WAITING:
            typer.secho(f"{job.run}: waiting: {status.message}", fg="yellow", err=True)
            return
        if status and status.world_size:
            return
        time.sleep(0.3)


def _fail_if_failed(view: "RunView") -> None:
    if view.failure:
        raise ClusterError(f"{view.run}: {view.failure}")


def _show_dry_run(config: JobConfig) -> None:
    import tempfile
    from pathlib import Path

    from isthmus.cluster.submission.code_package import build_package, package_bytes
    from isthmus.cluster.submission.jobs import job_environment, job_metadata
    from isthmus.cluster.supervision.resource_request import ResourceRequest

    with tempfile.TemporaryDirectory() as folder:
        count, size = package_bytes(build_package(config, Path(folder)))
    request, sizes = ResourceRequest.of(config), config.world_sizes
    facts = {
        "folder": f"{config.run.url.rstrip('/')}/{config.run.name}",
        "stages": ", ".join(f"{stage} ({config.stage(stage).steps} steps)" for stage in config.stages),
        "asks for": request.describe(sizes[-1]),
        "at least": request.describe(sizes[0]),
        "code": f"{count} files, {size / 1e3:.0f} kB",
        "environment": " ".join(f"{key}={value}" for key, value in job_environment(config).items()),
        "metadata": " ".join(f"{key}={value}" for key, value in job_metadata(config).items()),
    }
    typer.echo(f"{config.run.name}: the configuration is right; nothing was sent")
    for name, fact in facts.items():
        typer.echo(f"  {name:<12} {fact}")


def _views(run: str | None, address: str | None) -> "list[RunView]":
    """Return what is known of one run or of all, the newest job of each."""
    from isthmus.cluster.submission.run_view import RunView

    if run and is_url(run):
        return [RunView.of_folder(run.rstrip("/"))]
    jobs = open_jobs(address)
    if run:
        return [_view(jobs.latest(run))]
    newest: dict[str, Job] = {}
    for job in jobs.all():
        newest.setdefault(job.run, job)
    return [_view(job) for job in newest.values()]


def _view(job: "Job") -> "RunView":
    from isthmus.cluster.submission.run_view import RunView

    return RunView.of_job(job)


def _show(views: "list[RunView]", *, one: bool, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps([view.as_json() for view in views], indent=2))
    elif views:
        _print(_rendered(views, one=one))
    else:
        typer.echo("no runs; isthmus submit CONFIG starts one")


def _rendered(views: "list[RunView]", *, one: bool) -> Any:
    from isthmus.cluster.submission.run_text import details, table

    return details(views[0]) if one and views else table(views)


def _watch(views: "Callable[[], list[RunView]]") -> "list[RunView]":
    """Show runs until all have ended, and return their last state: live on a terminal, plain lines elsewhere."""
    from rich.live import Live

    now: list[RunView] = []
    lines = _Lines()
    try:
        with Live(refresh_per_second=2) if sys.stdout.isatty() else nullcontext() as live:
            for now in _until_over(views):
                if live:
                    live.update(_rendered(now, one=len(now) == 1))
                else:
                    lines.tell(now)
    except KeyboardInterrupt:
        typer.echo("no longer watching; what was at work goes on", err=True)
        raise typer.Exit(INTERRUPTED) from None
    return now


def _until_over(views: "Callable[[], list[RunView]]") -> "Iterator[list[RunView]]":
    """Yield the state every few seconds until every run has ended; a silence of the cluster is waited out for a while.

    Raises:
        ClusterError: at the first look, or when nobody has answered for long.
    """
    yield (now := views())
    answered_at = time.monotonic()
    while not all(view.is_over for view in now):
        time.sleep(WATCH_SECONDS)
        try:
            now = views()
        except (ClusterError, OSError, RuntimeError) as error:
            silence = time.monotonic() - answered_at
            if silence > SILENCE_SECONDS:
                raise ClusterError(
                    f"no answer for {silence:.0f} s, the run may still be running: {last_line(error)}"
                ) from error
            continue
        answered_at = time.monotonic()
        yield now


class _Lines:
    """Tells what happens in lines: each new state at once, mere progress now and then."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[tuple[str, str, int], float]] = {}

    def tell(self, views: "list[RunView]") -> None:
        """Print the lines that are due."""
        from isthmus.cluster.submission.run_text import line

        for view in views:
            news = (view.state, line(view).partition(": ")[2], len(view.status.restarts) if view.status else 0)
            before, at = self._told.get(view.run, (None, 0.0))
            if news != before or time.monotonic() - at > PROGRESS_SECONDS:
                self._told[view.run] = (news, time.monotonic())
                typer.echo(f"{time.strftime('%H:%M:%S')} {line(view)}")


def stored_config(run_url: str, store: "ObjectStore") -> JobConfig:
    """Return the configuration that a run's folder holds."""
    from isthmus.data_pipeline.store.object_store import NotFoundError, join

    url = join(run_url, "config.yaml")
    try:
        text = store.get(url).decode()
    except NotFoundError as error:
        raise ClusterError(f"{url}: absent, so this is no run's folder; give the folder that holds run.json") from error
    return check_config(parse_yaml(text, url), JobConfig, url)


def open_jobs(address: str | None) -> "Jobs":
    """Connect to a cluster's Jobs API with token authentication."""
    from isthmus.cluster.ray_nodes.auth import use_tokens

    use_tokens(create=False)
    from isthmus.cluster.submission.jobs import Jobs

    return Jobs(address)


def is_url(run: str) -> bool:
    """Return whether a run is given by the URL of its folder, not by its name."""
    return "/" in run


def _option(address: str | None) -> str:
    return f" --address {address}" if address else ""


def _print(renderable: Any) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False).print(renderable)
