"""`isthmus preflight`: checks before GPU hours are spent."""

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from isthmus.cluster.cli.options import AddressOption, JsonOption, OverridesArg, RecipeArg
from isthmus.cluster.cli.output import print_json, print_rich
from isthmus.cluster.config import JobConfig
from isthmus.trainer.config.loading import load_config

if TYPE_CHECKING:
    from isthmus.cluster.checks.preflight import Check

app = typer.Typer()
NOT_READY = 2


@app.command()
def preflight(
    config: RecipeArg,
    overrides: OverridesArg = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check nodes, network, object store, weights, data and versions, and say what to fix; exit code 2: not ready."""
    from isthmus.cluster.checks.preflight import run_as_job, run_on_embedded_ray

    resolved = load_config(config, overrides or [], JobConfig)
    where = address or resolved.cluster.address
    checks = run_as_job(resolved, where) if where else run_on_embedded_ray(resolved)
    if as_json:
        print_json([asdict(check) for check in checks])
    else:
        _print(checks)
    if not all(check.ok for check in checks):
        raise typer.Exit(NOT_READY)


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
