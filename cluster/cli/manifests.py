"""`isthmus manifests`: Kubernetes manifests of a run."""

from typing import Annotated, Literal

import typer

from isthmus.cluster.cli.options import OverridesArg, RecipeArg
from isthmus.cluster.config import JobConfig
from isthmus.trainer.config.loading import load_config

app = typer.Typer()

Kind = Literal["rayjob", "raycluster", "kueue"]


@app.command()
def manifests(
    config: RecipeArg,
    overrides: OverridesArg = None,
    kind: Annotated[
        Kind | None, typer.Option("--kind", help="Only this one [default: all that the run needs].")
    ] = None,
) -> None:
    """Print the KubeRay and Kueue manifests of a run, ready for `kubectl apply -f -`."""
    import yaml

    from isthmus.cluster.manifests import render as kubernetes

    resolved = load_config(config, overrides or [], JobConfig)
    if kind == "raycluster":
        documents = [kubernetes.ray_cluster(resolved)]
    elif kind == "rayjob":
        documents = [kubernetes.config_map(resolved), kubernetes.ray_job(resolved)]
    elif kind == "kueue":
        documents = kubernetes.queue(resolved)
    else:
        documents = kubernetes.render(resolved)
    typer.echo(yaml.safe_dump_all(documents, sort_keys=False, width=120), nl=False)
