"""`isthmus runs ls|show`, `isthmus report`: the content of run folders, read without a cluster."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.cluster.cli.options import EndpointOption, JsonOption, RegionOption, open_store, store_config
from isthmus.cluster.cli.output import data_size, print_json, print_rich, table

if TYPE_CHECKING:
    from collections.abc import Iterator

app = typer.Typer(help="Inspect runs in object storage.", no_args_is_help=True)
report_app = typer.Typer()
RunUrlArg = Annotated[str, typer.Argument(metavar="RUN_URL", help="Folder of a run: local or s3://.")]


@app.command()
def ls(
    folder: Annotated[str, typer.Argument(help="Folder that holds the runs' folders (run.url): local or s3://.")],
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the runs in a folder."""
    from isthmus.cluster.submission.run_folder import fail_fast_store, list_runs

    runs = list_runs(folder.rstrip("/"), fail_fast_store(store_config(endpoint_url, region)))
    if as_json:
        print_json(runs)
    elif not runs:
        typer.echo(f"{folder}: contains no runs; give the folder that a recipe names as run.url")
    else:
        rows = ((run["name"], _stages(run), str(run["attempts"]), run.get("problem") or run["holder"]) for run in runs)
        print_rich(table(("run", "checkpoints", "attempts>", "writer"), rows))


@app.command()
def show(
    run: RunUrlArg,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a run: its writer, its attempts, its checkpoints, what stage 2 was initialised from."""
    from isthmus.cluster.submission.run_folder import fail_fast_store, summary
    from isthmus.trainer.runs.store import read_run

    store, url = fail_fast_store(store_config(endpoint_url, region)), run.rstrip("/")
    found = {**summary(url, store), "record": read_run(url, store)}
    if as_json:
        print_json(found)
        return
    print_rich(table(None, _facts(found)))
    print_rich(table(("attempt>", "started (UTC)", "ended", "writer", "changed keys"), _attempts(found["record"])))


@report_app.command()
def report(
    run: RunUrlArg,
    out: Annotated[Path, typer.Option("--out", help="File to write.")] = Path("report.html"),
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
) -> None:
    """Write a self-contained HTML report of a run: results, curves, examples, goodput, restarts."""
    from isthmus.cluster.report import write_report

    path = write_report(run, open_store(endpoint_url, region), out)
    typer.echo(f"{path}: {data_size(path.stat().st_size)}; open it in a browser")


def _facts(found: dict[str, Any]) -> "Iterator[tuple[str, str]]":
    record = found["record"]
    yield found["name"], found["url"]
    yield "writer", found["holder"]
    yield "created", f"{_moment(record['created'])} UTC"
    for stage, steps in found["stages"].items():
        outcome = record.get("stages", {}).get(stage, "not finished")
        yield stage, f"{outcome}; checkpoints at {', '.join(map(str, steps))}"
    for stage, handoff in record.get("handoffs", {}).items():
        yield f"{stage} from", f"{len(handoff['taken'])} tensors of {handoff['url']}"


def _attempts(record: dict[str, Any]) -> "Iterator[tuple[str, ...]]":
    for attempt in record["attempts"]:
        changes = ", ".join(change["key"] for change in attempt["changes"])
        ended = _moment(attempt["ended"]) if "ended" in attempt else "not ended cleanly"
        yield str(attempt["token"]), _moment(attempt["started"]), ended, attempt["owner"], changes


def _moment(text: str) -> str:
    """Return an ISO time in UTC to the second."""
    return text[:19].replace("T", " ")


def _stages(run: dict[str, Any]) -> str:
    return ", ".join(f"{stage} step {steps[-1]}" for stage, steps in run["stages"].items()) or "none"
