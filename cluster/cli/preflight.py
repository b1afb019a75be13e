"""`isthmus preflight`: checks before GPU hours burn."""

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from isthmus.cluster.cli.config import ConfigPath, Json, Overrides
from isthmus.cluster.cli.jobs import ADDRESS_HELP
from isthmus.cluster.config import JobConfig
from isthmus.trainer.config.loading import load_config

if TYPE_CHECKING:
    from isthmus.cluster.checks.preflight import Check

app = typer.Typer()
NOT_READY = 2


@app.command()
def preflight(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Annotated[str | None, typer.Option("--address", help=ADDRESS_HELP)] = None,
    as_json: Json = False,
) -> None:
    """Check nodes, network, object store, weights, data and versions, and say what to mend; exit code 2: not ready."""
    resolved = load_config(config, overrides or [], JobConfig)
    place = address or resolved.cluster.address
    checks = _on_cluster(resolved, place) if place else _here(resolved)
    if as_json:
        from dataclasses import asdict

        typer.echo(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        _print(checks)
    if not all(check.ok for check in checks):
        raise typer.Exit(NOT_READY)


def _here(config: JobConfig) -> "list[Check]":
    from isthmus.cluster.embedded import embedded_ray

    with embedded_ray(config):
        from isthmus.cluster.checks.preflight import run_checks

        return run_checks(config)


def _on_cluster(config: JobConfig, address: str) -> "list[Check]":
    from isthmus.cluster.ray_nodes.auth import use_tokens

    use_tokens(create=False)
    from isthmus.cluster.checks.preflight import MARK, Check
    from isthmus.cluster.submission.jobs import Jobs

    for line in Jobs(address).run_to_end(config, "isthmus.cluster.checks.preflight"):
        if line.startswith(MARK):
            return [Check(**fields) for fields in json.loads(line.removeprefix(MARK))]
    raise AssertionError("run_to_end raises where the job gives no answer")


def _print(checks: "list[Check]") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("", "check", "where", "found", "remedy"):
        table.add_column(column, overflow="fold")
    for check in checks:
        mark = "[green]pass[/]" if check.ok else "[red]FAIL[/]"
        table.add_row(mark, check.name, check.where, check.found, check.remedy)
    Console(soft_wrap=not sys.stdout.isatty()).print(table)
    failed = sum(not check.ok for check in checks)
    typer.echo(f"{len(checks) - failed} checks passed, {failed} failed")
