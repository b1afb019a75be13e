"""`isthmus runs ls|show`, `isthmus report`: what the folders of runs hold, read without a cluster."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.cluster.cli.options import JsonOption

if TYPE_CHECKING:
    from isthmus.data_pipeline.store.object_store import ObjectStore

app = typer.Typer(help="Look at runs in object storage.", no_args_is_help=True)
report_app = typer.Typer()


@app.command()
def ls(
    folder: Annotated[str, typer.Argument(help="Folder that holds the runs' folders (run.url): local or s3://.")],
    as_json: JsonOption = False,
) -> None:
    """List the runs in a folder."""
    from isthmus.data_pipeline.store.object_store import ObjectStore

    store = ObjectStore()
    root = folder.rstrip("/")
    names = sorted(
        {info.url[len(root) :].strip("/").partition("/")[0] for info in store.list(root) if _is_run(info.url, root)}
    )
    runs = [summary(f"{root}/{name}", store) for name in names]
    if as_json:
        typer.echo(json.dumps(runs, indent=2))
        return
    for run in runs:
        typer.echo(f"{run['name']}  {run['holder']}  {_stages(run)}")


@app.command()
def show(
    run: Annotated[str, typer.Argument(help="URL of a run's folder.")],
    as_json: JsonOption = False,
) -> None:
    """Show a run: who has it, its attempts, its checkpoints, what was handed over."""
    from isthmus.data_pipeline.store.object_store import ObjectStore
    from isthmus.trainer.runs.store import read_run

    store = ObjectStore()
    url = run.rstrip("/")
    found = {**summary(url, store), "record": read_run(url, store)}
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    typer.echo(f"{found['name']}  {found['holder']}\n  created {found['record']['created']}")
    for attempt in found["record"]["attempts"]:
        changes = ", ".join(change["key"] for change in attempt["changes"])
        ended = attempt.get("ended", "not ended in order")
        typer.echo(
            f"  attempt {attempt['token']}: {attempt['owner']}, {attempt['started']} - {ended}"
            + (f"; changed {changes}" if changes else "")
        )
    for stage, steps in found["stages"].items():
        outcome = found["record"].get("stages", {}).get(stage, "not ended in order")
        typer.echo(f"  {stage}: {outcome}; checkpoints at {', '.join(map(str, steps))}")
    for stage, record in found["record"].get("handoffs", {}).items():
        typer.echo(f"  {stage} began with {len(record['taken'])} tensors of {record['url']}")


@report_app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="RUN_URL", help="Folder of a run: local or s3://.")],
    out: Annotated[Path, typer.Option("--out", help="File to write.")] = Path("report.html"),
) -> None:
    """Write a page about a run: results, curves, examples, goodput, restarts; opens anywhere, offline."""
    from isthmus.cluster.report import write_report
    from isthmus.data_pipeline.store.object_store import ObjectStore

    path = write_report(run, ObjectStore(), out)
    typer.echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB; open it in a browser")


def summary(url: str, store: "ObjectStore") -> dict[str, Any]:
    """Return what a list shows of a run."""
    from isthmus.data_pipeline.store.object_store import join
    from isthmus.trainer.checkpoint.reader import list_checkpoints
    from isthmus.trainer.runs.lease import read_lease
    from isthmus.trainer.runs.store import LEASE, read_run

    run = read_run(url, store)
    lease = read_lease(join(url, LEASE), store)
    holder = "free" if lease is None or lease.released else f"held by {lease.owner} since {lease.since}"
    stages = {}
    for stage in ("stage1", "stage2"):
        steps = sorted(saved.step for saved in list_checkpoints(join(url, stage, "checkpoints"), store))
        if steps:
            stages[stage] = steps
    return {"name": run["name"], "url": url, "holder": holder, "attempts": len(run["attempts"]), "stages": stages}


def _is_run(url: str, root: str) -> bool:
    from isthmus.trainer.runs.store import RUN

    return url[len(root) :].strip("/").count("/") == 1 and url.endswith(f"/{RUN}")


def _stages(run: dict[str, Any]) -> str:
    return ", ".join(f"{stage} step {steps[-1]}" for stage, steps in run["stages"].items()) or "no checkpoint"
