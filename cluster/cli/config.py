"""`isthmus config`: show, describe and compare run configurations."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.cluster.cli.options import EndpointOption, JsonOption, OverridesArg, RecipeArg, RegionOption, open_store
from isthmus.cluster.cli.output import print_json
from isthmus.cluster.config import JobConfig
from isthmus.trainer.config.loading import (
    Change,
    check_config,
    config_hash,
    diff_configs,
    load_config,
    parse_yaml,
    to_yaml,
)

if TYPE_CHECKING:
    from isthmus.data_pipeline.store.object_store import ObjectStore

app = typer.Typer(help="Show, describe and compare run configurations.", no_args_is_help=True)


@app.command()
def show(config: RecipeArg, overrides: OverridesArg = None, as_json: JsonOption = False) -> None:
    """Print the resolved configuration and its content hash."""
    resolved = load_config(config, overrides or [], JobConfig)
    if as_json:
        print_json({"hash": config_hash(resolved), "config": resolved.model_dump(mode="json")})
    else:
        typer.echo(f"# sha256 {config_hash(resolved)}\n{to_yaml(resolved)}", nl=False)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    print_json(JobConfig.model_json_schema())


@app.command()
def diff(
    old: Annotated[str, typer.Argument(help="Recipe file, or folder (local or s3://) of a run.")],
    new: Annotated[str, typer.Argument(help="Recipe file, or folder (local or s3://) of a run.")],
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the keys whose values differ between two recipes or runs."""
    store = open_store(endpoint_url, region)
    changes = diff_configs(_resolved(old, store), _resolved(new, store))
    if as_json:
        print_json([change._asdict() for change in changes])
        return
    for change in changes:
        typer.echo(_line(change))
    if not changes:
        typer.echo("no difference")


def _line(change: Change) -> str:
    return f"{change.key}: {json.dumps(change.old)} -> {json.dumps(change.new)}"


def _resolved(place: str, store: "ObjectStore") -> dict[str, Any]:
    """Return the resolved configuration of a recipe file or of a run's folder."""
    if place.endswith((".yaml", ".yml")) and "://" not in place:
        return load_config(place, [], JobConfig).model_dump(mode="json")
    from isthmus.data_pipeline.store.object_store import join

    url = place if place.endswith((".yaml", ".yml")) else join(place.rstrip("/"), "config.yaml")
    text = store.get(url).decode()
    return check_config(parse_yaml(text, url), JobConfig, url).model_dump(mode="json")
