"""`isthmus estimate`: memory, time and cost before a run is started. `isthmus manifests`: its Kubernetes manifests."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from isthmus.cluster.cli.options import JsonOption, OverridesArg, RecipeArg
from isthmus.cluster.cli.output import print_json, print_rich, table
from isthmus.cluster.config import JobConfig
from isthmus.trainer.config.loading import load_config
from isthmus.trainer.errors import ConfigError

if TYPE_CHECKING:
    from isthmus.trainer.estimate.hardware import Assumptions, Cluster, Gpu
    from isthmus.trainer.estimate.step import StageEstimate


app = typer.Typer()
Kind = Literal["rayjob", "raycluster", "kueue"]


@app.command()
def estimate(
    config: RecipeArg,
    overrides: OverridesArg = None,
    gpu: Annotated[str, typer.Option(help="Card, such as a100-40g, a100-80g, h100, h200, l40s.")] = "h100",
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 8,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs per node.")] = 8,
    price: Annotated[float | None, typer.Option(help="Price of a GPU hour; adds the cost to the output.")] = None,
    assume: Annotated[list[str] | None, typer.Option(help="Override an assumption: name=value.")] = None,
    sweep: Annotated[str | None, typer.Option(help="Scaling curve, such as gpus=8,16,32.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write the curve to this PNG file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Predict memory per GPU, step time, days and cost of a run."""
    from isthmus.trainer.estimate.architectures import load_parts
    from isthmus.trainer.estimate.hardware import Cluster, find_gpu, with_overrides
    from isthmus.trainer.estimate.report import draw, draw_sweep
    from isthmus.trainer.estimate.step import divisible, estimate_stage

    resolved = load_config(config, overrides or [], JobConfig)
    card, assumptions = with_overrides(find_gpu(gpu), _numbers(assume or []))
    parts, sources = load_parts(resolved)

    def on(cluster: Cluster, config: JobConfig) -> "list[StageEstimate]":
        return [estimate_stage(config, stage, parts, cluster, assumptions) for stage in config.stages]

    if sweep is not None:
        sizes = _sizes(sweep)
        by_size = [on(Cluster(card, size, gpus_per_node), divisible(resolved, size)) for size in sizes]
        if png is not None:
            draw_sweep(sizes, by_size, gpu, png)
        _print_sweep(sizes, by_size, card, assumptions, as_json=as_json)
        return
    cluster = Cluster(card, gpus, gpus_per_node)
    estimates = on(cluster, resolved)
    if png is not None:
        draw(estimates, cluster, png)
    _print_estimates(estimates, cluster, sources, assumptions, price, as_json=as_json)


@app.command()
def manifests(
    config: RecipeArg,
    overrides: OverridesArg = None,
    kind: Annotated[
        Kind | None, typer.Option("--kind", help="Print only this kind (default: all that the run needs).")
    ] = None,
) -> None:
    """Print the KubeRay and Kueue manifests of a run, ready for `kubectl apply -f -`."""
    import yaml

    from isthmus.cluster.manifests import render as kubernetes

    resolved = load_config(config, overrides or [], JobConfig)
    if kind == "raycluster":
        documents = [kubernetes.network_policy(resolved), kubernetes.ray_cluster(resolved)]
    elif kind == "rayjob":
        documents = [kubernetes.config_map(resolved), kubernetes.ray_job(resolved)]
    elif kind == "kueue":
        documents = kubernetes.queue(resolved)
    else:
        documents = kubernetes.render(resolved)
    typer.echo(yaml.safe_dump_all(documents, sort_keys=False, width=120), nl=False)


def _print_estimates(
    estimates: "list[StageEstimate]",
    cluster: "Cluster",
    sources: list[str],
    assumptions: "Assumptions",
    price: float | None,
    *,
    as_json: bool,
) -> None:
    from isthmus.trainer.estimate import report

    hardware, assumed = f"{cluster.num_gpus} x {cluster.gpu.name}", {"assumptions": vars(assumptions)}
    if as_json:
        stages = {estimate.stage: report.as_json(estimate, price) for estimate in estimates}
        print_json({"hardware": hardware, "gpu": vars(cluster.gpu), "stages": stages, **assumed})
        return
    for estimate in estimates:
        typer.echo(f"{estimate.stage} on {hardware}")
        print_rich(table(None, report.rows(estimate, price)))
        typer.echo()
    typer.echo(f"Dimensions: {'; '.join(sources)}")
    _print_assumed(cluster.gpu, assumptions)


def _print_sweep(
    sizes: list[int], by_size: "list[list[StageEstimate]]", gpu: "Gpu", assumptions: "Assumptions", *, as_json: bool
) -> None:
    from isthmus.trainer.estimate import report

    if as_json:
        stages = [{e.stage: report.as_json(e, None) for e in estimates} for estimates in by_size]
        sweep = [{"gpus": size, "stages": found} for size, found in zip(sizes, stages, strict=True)]
        print_json({"gpu": vars(gpu), "sweep": sweep, "assumptions": vars(assumptions)})
        return
    header, *lines = report.sweep_rows(sizes, by_size)
    typer.echo(f"{gpu.name}: the same run on more GPUs")
    print_rich(table(header, lines))
    typer.echo("A global batch that a size does not divide is rounded down to one that it does.")
    _print_assumed(gpu, assumptions)


def _print_assumed(gpu: "Gpu", assumptions: "Assumptions") -> None:
    from isthmus.trainer.estimate.report import assumption_lines

    typer.echo(f"Assumed (override with --assume name=value): {', '.join(assumption_lines(gpu, assumptions))}")


def _sizes(sweep: str) -> list[int]:
    name, _, values = sweep.partition("=")
    try:
        sizes = [int(value) for value in values.split(",")]
    except ValueError:
        sizes = []
    if name != "gpus" or not sizes or min(sizes) < 1:
        raise ConfigError(f"--sweep {sweep}: not of the form gpus=8,16,32")
    return sizes


def _numbers(given: list[str]) -> dict[str, float]:
    numbers = {}
    for item in given:
        name, _, value = item.partition("=")
        try:
            numbers[name] = float(value)
        except ValueError as error:
            raise ConfigError(f"--assume {item}: not of the form name=number") from error
    return numbers
