"""`isthmus preflight`: checks before GPU hours are spent. `isthmus doctor`: an archive for diagnosing a run."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.cluster.cli.options import (
    AddressOption,
    EndpointOption,
    JsonOption,
    OverridesArg,
    RecipeArg,
    RegionOption,
    RunArg,
    find_run,
)
from isthmus.cluster.cli.output import data_size, print_json, print_rich
from isthmus.cluster.config import JobConfig
from isthmus.cluster.errors import ClusterError
from isthmus.trainer.config.loading import load_config

if TYPE_CHECKING:
    from isthmus.cluster.checks.preflight import Check

app = typer.Typer()
NOT_READY = 2
MAX_JOBS = 10
"""Newest jobs of a run whose logs the doctor collects."""


@app.command()
def preflight(
    config: RecipeArg,
    overrides: OverridesArg = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check nodes, network, object store, weights, data and versions; exit code 2 if anything needs fixing.

    Without an address, the checks run on a Ray that is started on this machine for them.
    """
    from isthmus.cluster.checks.preflight import run_as_job, run_on_embedded_ray
    from isthmus.cluster.submission.dashboard import address_of_environment

    resolved = load_config(config, overrides or [], JobConfig)
    where = address or resolved.cluster.address or address_of_environment()
    checks = run_as_job(resolved, where) if where else run_on_embedded_ray(resolved)
    if as_json:
        print_json([asdict(check) for check in checks])
    else:
        _print(checks)
    if not all(check.ok for check in checks):
        raise typer.Exit(NOT_READY)


@app.command()
def doctor(
    run: RunArg,
    address: AddressOption = None,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="File to write (default: RUN-doctor.tar.gz).")] = None,
) -> None:
    """Collect configuration, versions, events, logs and stack dumps of a run into one archive without secrets."""
    from isthmus.cluster.checks.doctor import collect, write_private
    from isthmus.cluster.submission.jobs import Jobs
    from isthmus.cluster.submission.run_folder import is_url, stored_config

    facts: dict[str, Any] = {}
    logs: dict[str, str] = {}
    url, store = find_run(run, address, endpoint_url, region)
    if not is_url(run):
        jobs = Jobs(address)
        known = jobs.of_run(run)
        logs = {job.id: jobs.logs(job) for job in known[:MAX_JOBS]}
        facts = {"address": jobs.address, "jobs": [asdict(job) for job in known], "nodes": jobs.nodes()}
    config = stored_config(url, store)
    path = out or Path(f"{config.run.name}-doctor.tar.gz")
    try:
        write_private(path, collect(url, store, logs, facts, config.cluster.secrets))
    except OSError as error:
        raise ClusterError(f"{path}: cannot be written ({error.strerror}); give another place with --out") from error
    typer.echo(f"{path}: {data_size(path.stat().st_size)}; review it before you share it")


def _print(checks: "list[Check]") -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("", "check", "where", "found", "remedy"):
        table.add_column(column, overflow="fold")
    for check in checks:
        mark = "[green]pass[/]" if check.ok else "[red]FAIL[/]"
        table.add_row(mark, check.name, check.where, check.found, check.remedy)
    print_rich(table)
    failed = sum(not check.ok for check in checks)
    typer.echo(f"{len(checks) - failed} checks passed, {failed} failed")
