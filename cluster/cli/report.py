"""`isthmus report`: one HTML file about a run, from its folder, without a cluster."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="RUN_URL", help="Folder of a run: local or s3://.")],
    out: Annotated[Path, typer.Option("--out", help="File to write.")] = Path("report.html"),
) -> None:
    """Write a page about a run: results, curves, examples, goodput, restarts; opens anywhere, offline."""
    from isthmus.cluster.report import write_report
    from isthmus.data_pipeline.store.object_store import ObjectStore

    path = write_report(run, ObjectStore(), out)
    typer.echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB; open it in a browser")
