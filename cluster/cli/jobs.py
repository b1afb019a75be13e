"""`isthmus submit|status|logs|stop|resume|ls`: runs on a Ray cluster."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.cluster.cli.options import (
    AddressOption,
    AllowChangeOption,
    EndpointOption,
    JsonOption,
    OverridesArg,
    RecipeArg,
    RegionOption,
    RunArg,
    RunNameArg,
    SkipStepsOption,
    WatchOption,
    find_run,
    store_config,
)
from isthmus.cluster.cli.output import data_size, print_json, print_rich
from isthmus.cluster.config import JobConfig
from isthmus.cluster.errors import ClusterError
from isthmus.trainer.config.loading import load_config
from isthmus.trainer.context import Outcome

if TYPE_CHECKING:
    from isthmus.cluster.submission.job import Submitted
    from isthmus.cluster.submission.run_view import RunView

app = typer.Typer()

INTERRUPTED = 130
PROGRESS_SECONDS = 30.0


@app.command()
def submit(
    config: RecipeArg,
    overrides: OverridesArg = None,
    address: AddressOption = None,
    watch: WatchOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and show what would be sent, without sending it.")
    ] = False,
    allow_change: AllowChangeOption = None,
) -> None:
    """Submit a run to a Ray cluster; a run that is already active is not changed."""
    resolved = load_config(config, overrides or [], JobConfig)
    address = address or resolved.cluster.address
    if dry_run:
        _show_dry_run(resolved, address)
    else:
        submit_job(resolved, address, watch=watch, allow_change=allow_change or [])


@app.command()
def resume(
    run: RunArg,
    address: AddressOption = None,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
    watch: WatchOption = False,
    skip_steps: SkipStepsOption = None,
) -> None:
    """Resume a run from its last committed checkpoint, or a bootstrap; with a URL, also on another cluster."""
    from isthmus.cluster.submission.run_folder import is_url, stored_config, stored_job
    from isthmus.cluster.submission.skip_steps import with_skipped

    url, store = find_run(run, address, endpoint_url, region)
    resolved = stored_config(url, store) if skip_steps else stored_job(url, store)
    if is_url(run):
        address = address or resolved.cluster.address
    changed: list[str] = []
    if skip_steps and isinstance(resolved, JobConfig):
        resolved, changed = with_skipped(resolved, skip_steps, url, store)
    submit_job(resolved, address, watch=watch, allow_change=changed, must_be_new="--skip-steps" if skip_steps else "")


@app.command()
def status(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="Run name or URL of its folder (default: all runs).")
    ] = None,
    address: AddressOption = None,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
    watch: WatchOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show state, stage, step, time left, workers, goodput, restarts and the last committed checkpoint."""
    from isthmus.cluster.submission.watch import known_runs

    store = store_config(endpoint_url, region)
    if watch and not as_json:
        _watch(lambda: known_runs(run, address, store))
    else:
        _show(known_runs(run, address, store), one=run is not None, as_json=as_json)


@app.command()
def ls(address: AddressOption = None, as_json: JsonOption = False) -> None:
    """List the runs on the cluster, newest first."""
    from isthmus.cluster.submission.watch import known_runs

    _show(known_runs(None, address, store_config(None, None)), one=False, as_json=as_json)


@app.command()
def logs(
    run: RunNameArg,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Follow the log until the run ends.")] = False,
    rank: Annotated[int | None, typer.Option("--rank", help="Only lines of this rank.")] = None,
    tail: Annotated[
        int, typer.Option("--tail", min=1, help="Number of lines from the end of the log; at most 8 MiB.")
    ] = 10_000,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the log of a run's newest job."""
    from isthmus.cluster.logs import parse_line, render_line
    from isthmus.cluster.submission.jobs import Jobs

    jobs = Jobs(address)
    job = jobs.latest(run)
    found = False
    for text in jobs.follow(job, tail) if follow else iter(jobs.logs(job, tail).splitlines()):
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
    run: RunNameArg,
    address: AddressOption = None,
    grace_seconds: Annotated[
        float, typer.Option("--grace", help="Longest wait for the checkpoint, in seconds.")
    ] = 180.0,
) -> None:
    """Save a checkpoint at the next step boundary, then end the run; `isthmus resume` continues it.

    A bootstrap stops immediately, because its finished shards are saved.
    """
    from isthmus.cluster.submission.jobs import Jobs
    from isthmus.cluster.submission.run_view import RunView

    jobs = Jobs(address)
    job = jobs.latest(run)
    if job.is_over:
        typer.echo(f"{run}: not running ({job.status.lower()})")
        return
    typer.echo(f"{run}: saving what is done, then stopping", err=True)
    job = jobs.stop(job, grace_seconds)
    view = RunView.of_job(job)
    saved = view.status.committed_step if view.status else None
    typer.echo(f"{run}: {job.status.lower()}" + (f", saved at step {saved}" if saved is not None else ""))
    typer.echo(f"  isthmus resume {run}{_option(address)}")


def submit_job(
    config: "Submitted", address: str | None, *, watch: bool, allow_change: Sequence[str] = (), must_be_new: str = ""
) -> None:
    """Submit a run or a bootstrap. `must_be_new`: an option that a run cannot take while it is active."""
    from isthmus.cluster.submission.admission import check_against_run, check_inputs, shortage
    from isthmus.cluster.submission.jobs import Jobs
    from isthmus.cluster.submission.run_view import RunView
    from isthmus.cluster.submission.watch import first_sign

    check_inputs(config, address)
    jobs = Jobs(address)
    if isinstance(config, JobConfig):
        check_against_run(config, allow_change)
    job, is_new = jobs.submit(config, allow_change)
    name = config.run.name
    if must_be_new and not is_new:
        raise ClusterError(
            f"{name}: active as job {job.id}, which cannot take {must_be_new}; stop it first: isthmus stop {name}"
        )
    typer.echo(f"{name}: {'submitted' if is_new else 'already active'} as job {job.id} at {jobs.address}")
    if is_new and isinstance(config, JobConfig) and (missing := shortage(jobs, config)):
        _say_waiting(name, f"{missing}; add nodes, end other jobs, or lower cluster.workers")
    elif is_new:
        view = first_sign(jobs, job)
        _fail_if_failed(view)
        if view.state == "waiting" and view.current:
            _say_waiting(name, view.current.message)
    for verb in (f"status {name} --watch", f"logs -f {name}", f"stop {name}", f"resume {name}"):
        typer.echo(f"  isthmus {verb}{_option(address)}")
    if watch:
        ended = _watch(lambda: [RunView.of_job(jobs.get(job.id))])[0]
        _fail_if_failed(ended)
        if ended.state != "finished":
            raise typer.Exit(Outcome.STOPPED.exit_code)


def _say_waiting(run: str, why: str) -> None:
    typer.secho(f"{run}: waiting: {why}", fg="yellow", err=True)


def _fail_if_failed(view: "RunView") -> None:
    if view.failure:
        raise ClusterError(f"{view.run}: {view.failure}")


def _show_dry_run(config: JobConfig, address: str | None) -> None:
    import tempfile
    from pathlib import Path

    from isthmus.cluster.submission.admission import check_inputs
    from isthmus.cluster.submission.code_package import build_package, package_bytes
    from isthmus.cluster.submission.job import job_environment, job_metadata
    from isthmus.cluster.supervision.resource_request import ResourceRequest

    check_inputs(config, address)
    with tempfile.TemporaryDirectory() as folder:
        count, size = package_bytes(build_package(config, Path(folder)))
    request, sizes = ResourceRequest.of(config), config.world_sizes
    facts = {
        "folder": f"{config.run.url.rstrip('/')}/{config.run.name}",
        "stages": ", ".join(f"{stage} ({config.stage(stage).steps} steps)" for stage in config.stages),
        "asks for": request.describe(sizes[-1]),
        "at least": request.describe(sizes[0]),
        "code": f"{count} files, {data_size(size)}",
        "environment": " ".join(f"{key}={value}" for key, value in job_environment(config).items()),
        "metadata": " ".join(f"{key}={value}" for key, value in job_metadata(config).items()),
    }
    typer.echo(f"{config.run.name}: the configuration is valid; nothing was sent")
    for name, fact in facts.items():
        typer.echo(f"  {name:<12} {fact}")


def _show(views: "list[RunView]", *, one: bool, as_json: bool) -> None:
    if as_json:
        print_json([view.as_json() for view in views])
    elif views:
        print_rich(_rendered(views, one=one))
    else:
        typer.echo("no runs; isthmus submit RECIPE starts one")


def _rendered(views: "list[RunView]", *, one: bool) -> Any:
    from isthmus.cluster.cli.run_text import details, overview

    return details(views[0]) if one and views else overview(views)


def _watch(look: "Callable[[], list[RunView]]") -> "list[RunView]":
    """Show runs until all have ended, and return their last state: live on a terminal, plain lines elsewhere."""
    from rich.live import Live

    from isthmus.cluster.submission.watch import until_over

    now: list[RunView] = []
    lines = _Lines()
    try:
        with Live(refresh_per_second=2) if sys.stdout.isatty() else nullcontext() as live:
            for now in until_over(look):
                if live:
                    live.update(_rendered(now, one=len(now) == 1))
                else:
                    lines.print(now)
    except KeyboardInterrupt:
        typer.echo("stopped watching; active runs continue", err=True)
        raise typer.Exit(INTERRUPTED) from None
    return now


class _Lines:
    """Prints what happens line by line: each new state at once, progress every 30 s."""

    def __init__(self) -> None:
        self._printed: dict[str, tuple[tuple[str, str, int], float]] = {}

    def print(self, views: "list[RunView]") -> None:
        """Print the lines that are due."""
        from isthmus.cluster.cli.run_text import line

        for view in views:
            news = (view.state, line(view).partition(": ")[2], view.status.num_restarts if view.status else 0)
            before, at = self._printed.get(view.run, (None, 0.0))
            if news != before or time.monotonic() - at > PROGRESS_SECONDS:
                self._printed[view.run] = (news, time.monotonic())
                typer.echo(f"{time.strftime('%H:%M:%S')} {line(view)}")


def _option(address: str | None) -> str:
    return f" --address {address}" if address else ""
