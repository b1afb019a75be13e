"""`isthmus doctor`: one archive with what is needed to understand a run."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from isthmus.cluster.cli.options import AddressOption, RunArg
from isthmus.cluster.errors import ClusterError

app = typer.Typer()


@app.command()
def doctor(
    run: RunArg,
    address: AddressOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="File to write [default: RUN-doctor.tar.gz].")] = None,
) -> None:
    """Collect configuration, versions, events, logs and stack dumps of a run into one archive without secrets."""
    from isthmus.cluster.checks.doctor import collect, write_private
    from isthmus.cluster.submission.jobs import Jobs
    from isthmus.cluster.submission.run_folder import is_url, stored_config
    from isthmus.data_pipeline.store.object_store import ObjectStore

    facts: dict[str, Any] = {}
    logs: dict[str, str] = {}
    if is_url(run):
        url, store = run.rstrip("/"), ObjectStore()
    else:
        jobs = Jobs(address)
        job = jobs.latest(run)
        url, store = job.run_url, ObjectStore(job.store)
        known = jobs.of_run(run)
        logs = {job.id: jobs.logs(job) for job in known}
        facts = {"address": jobs.address, "jobs": [asdict(job) for job in known], "nodes": jobs.nodes()}
    config = stored_config(url, store)
    path = out or Path(f"{config.run.name}-doctor.tar.gz")
    try:
        write_private(path, collect(url, store, logs, facts, config.cluster.secrets))
    except OSError as error:
        raise ClusterError(f"{path}: cannot be written ({error.strerror}); give another place with --out") from error
    typer.echo(f"{path}: {path.stat().st_size / 1e3:.0f} kB; look through it before you pass it on")
