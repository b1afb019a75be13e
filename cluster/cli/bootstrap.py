"""`isthmus bootstrap`: captions written, scored and chosen for a data set, each stage alone or all by a recipe."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from isthmus.cluster.cli.options import (
    EndpointOption,
    OverridesArg,
    RecipeArg,
    RegionOption,
    WatchOption,
    open_runner,
    open_store,
)
from isthmus.cluster.cli.output import progress

if TYPE_CHECKING:
    from isthmus.bootstrap.pace import Progress
    from isthmus.bootstrap.stage import Pool, ShardWork
    from isthmus.data_pipeline.dataset.manifest import Manifest
    from isthmus.data_pipeline.store.object_store import ObjectStore

app = typer.Typer(
    help="Generate, score and select captions for a data set without copying images.", no_args_is_help=True
)

ManifestArg = Annotated[
    str, typer.Argument(metavar="MANIFEST", help="URL of a manifest folder, as written by `isthmus data index`.")
]
OutArg = Annotated[str, typer.Argument(metavar="OUT", help="Folder URL for all stages; run again to resume.")]
WORKERS_HELP = "Local processes, or actors with --address; each loads the models."
WorkersOption = Annotated[int, typer.Option("--workers", min=1, help=WORKERS_HELP)]
ADDRESS_HELP = "Run in actors on this Ray cluster ('auto': this node's). Local paths must exist on all nodes."
AddressOption = Annotated[str | None, typer.Option("--address", help=ADDRESS_HELP)]
GpusOption = Annotated[float, typer.Option("--gpus", min=0, help="GPUs of each actor.")]
PriceOption = Annotated[
    float, typer.Option("--price", min=0, help="Price of one worker per hour, for the cost estimate.")
]
SettingsArg = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Keys of this stage in a recipe, such as batch_size=16."),
]


@app.command()
def caption(
    manifest: ManifestArg,
    out: OutArg,
    model: Annotated[str, typer.Option("--model", help="Folder of a captioning model.")],
    settings: SettingsArg = None,
    workers: WorkersOption = 1,
    gpus: GpusOption = 0.0,
    price: PriceOption = 0.0,
    address: AddressOption = None,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
) -> None:
    """Generate candidate captions for every image, for example with num_candidates=5 method=nucleus."""
    from isthmus.bootstrap.caption import caption_work
    from isthmus.bootstrap.config import CaptionConfig
    from isthmus.trainer.config.loading import config_from

    config = config_from({"model": model}, settings or [], CaptionConfig, "caption")
    store, loaded = _open(manifest, endpoint_url, region)
    _run(lambda: caption_work(loaded, out, config, store), loaded, out, store, _pool(workers, address, gpus, price))


@app.command()
def score(
    manifest: ManifestArg,
    out: OutArg,
    settings: SettingsArg = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", help="Folder of a stage-1 export, CLIP or SigLIP.")
    ] = None,
    workers: WorkersOption = 1,
    gpus: GpusOption = 0.0,
    price: PriceOption = 0.0,
    address: AddressOption = None,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
) -> None:
    """Score the generated captions and the images' own texts, for example with language=en."""
    from isthmus.bootstrap.config import ScoreConfig
    from isthmus.bootstrap.score import score_work
    from isthmus.trainer.config.loading import config_from

    config = config_from({"models": model or []}, settings or [], ScoreConfig, "score")
    store, loaded = _open(manifest, endpoint_url, region)
    _run(lambda: score_work(loaded, out, config, store), loaded, out, store, _pool(workers, address, gpus, price))


@app.command()
def select(
    manifest: ManifestArg,
    out: OutArg,
    settings: SettingsArg = None,
    duplicates: Annotated[
        str | None,
        typer.Option(
            "--duplicates",
            metavar="LAYER",
            help="Layer of `isthmus bootstrap duplicates`; its marked images are excluded.",
        ),
    ] = None,
    to: Annotated[str, typer.Option("--to", help="Name of the selection's folder in OUT.")] = "selected",
    processes: Annotated[int, typer.Option("--processes", min=1, help="Local processes.")] = os.cpu_count() or 1,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
) -> None:
    """Write a manifest with the texts and images that a rule keeps, such as method=top score=clip keep=2.

    It reads no images or models. The rules are in docs/bootstrap.md.
    """
    from isthmus.bootstrap.score import SCORED
    from isthmus.bootstrap.select import select as choose
    from isthmus.bootstrap.select_rule import SelectRule
    from isthmus.data_pipeline.layers.layer import Layer
    from isthmus.data_pipeline.process_pool import run_in_processes
    from isthmus.data_pipeline.store.object_store import join
    from isthmus.trainer.config.loading import config_from

    rule = config_from({"method": "match"}, settings or [], SelectRule, "select")
    store, loaded = _open(manifest, endpoint_url, region)
    layer = Layer.load(join(out, SCORED), store)
    marks = Layer.load(duplicates, store) if duplicates else None
    run = run_in_processes(processes)
    with progress("shards", len(loaded.shards)) as advance:
        found = choose(manifest, layer, rule, join(out, to), store, run, duplicates=marks, on_shard=advance)
    typer.echo(f"{join(out, to)}: {found.manifest.num_samples:,} of {loaded.num_samples:,} images")
    for label, count in found.counts.items():
        typer.echo(f"  {label:<28}{count:>12,}")


@app.command()
def duplicates(
    manifests: Annotated[
        list[str], typer.Argument(metavar="MANIFEST...", help="Data sets; the first of similar images is kept.")
    ],
    out: Annotated[str, typer.Option("--out", help="Folder URL for hashes and marks; run again to resume.")],
    against: Annotated[
        list[str] | None,
        typer.Option("--against", metavar="MANIFEST", help="Manifest of an evaluation set (repeatable)."),
    ] = None,
    max_distance: Annotated[
        int,
        typer.Option(
            "--max-distance", min=0, max=7, help="Largest difference between hashes of similar images, in bits of 64."
        ),
    ] = 3,
    processes: Annotated[int, typer.Option("--processes", min=1, help="Local processes.")] = os.cpu_count() or 1,
    address: AddressOption = None,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
) -> None:
    """Mark images that are duplicates, across all given data sets, or occur in an evaluation set; for `select`."""
    from collections import Counter

    from isthmus.bootstrap.duplicates.marks import mark_duplicates
    from isthmus.data_pipeline.dataset.manifest import Manifest

    store = open_store(endpoint_url, region)
    sources, evaluation = ([Manifest.load(url, store) for url in urls] for urls in (manifests, against or []))
    run = open_runner(processes, address)
    with progress("shards", sum(len(one.shards) for one in (*sources, *evaluation))) as advance:
        layers = mark_duplicates(
            sources, out, store, run, against=evaluation, max_distance=max_distance, on_shard=advance
        )
    for url, manifest, layer in zip(manifests, sources, layers, strict=True):
        counts = sum((Counter(file.counts) for file in layer.files), Counter[str]())
        of = f"of {manifest.num_samples:,} images of {url}"
        typer.echo(f"{layer.url}: {counts['duplicates']:,} duplicates, {counts['leaks']:,} leaks {of}")


@app.command()
def report(
    out: OutArg,
    to: Annotated[str | None, typer.Option("--out", help="File to write (default: OUT/report.html).")] = None,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
) -> None:
    """Write a self-contained HTML report of a bootstrap: acceptance, scores, examples, time and cost."""
    from isthmus.cluster.report.bootstrap_page import REPORT, write_bootstrap_report
    from isthmus.data_pipeline.store.object_store import join

    store = open_store(endpoint_url, region)
    typer.echo(f"{write_bootstrap_report(out.rstrip('/'), store, to or join(out, REPORT))}: open it in a browser")


@app.command()
def run(
    recipe: RecipeArg,
    overrides: OverridesArg = None,
    address: Annotated[
        str | None,
        typer.Option("--address", help="Dashboard of a cluster to submit the job to, as with `isthmus submit`."),
    ] = None,
    local: Annotated[bool, typer.Option("--local", help="Run in this process, without Ray.")] = False,
    watch: WatchOption = False,
) -> None:
    """Run all stages of a recipe, including training before and after; run again to resume."""
    from isthmus.cluster.bootstrap_job import BootstrapJob
    from isthmus.trainer.config.loading import load_config

    job = load_config(recipe, overrides or [], BootstrapJob)
    address = address or job.cluster.address
    if address and not local:
        from isthmus.cluster.cli.jobs import submit_job

        submit_job(job, address, watch=watch)
        return
    from isthmus.cluster.bootstrap_driver import run_bootstrap_here
    from isthmus.cluster.cli.train import log_to_terminal
    from isthmus.cluster.submission.input_paths import check_present

    check_present(job)
    log_to_terminal()
    raise typer.Exit(run_bootstrap_here(job, on_ray=not local).exit_code)


def _open(manifest: str, endpoint_url: str | None, region: str | None) -> "tuple[ObjectStore, Manifest]":
    from isthmus.data_pipeline.dataset.manifest import Manifest

    store = open_store(endpoint_url, region)
    return store, Manifest.load(manifest, store)


def _pool(workers: int, address: str | None, gpus: float, price: float) -> "Pool":
    from isthmus.bootstrap.stage import Pool

    if address is None:
        from isthmus.data_pipeline.process_pool import run_in_processes

        return Pool(run_in_processes(workers), workers, price)
    from isthmus.bootstrap.ray_pool import run_in_actors
    from isthmus.cluster.ray_nodes.ray_map import connect

    connect(address, with_logs=True)
    return Pool(run_in_actors((1, workers), gpus=gpus), workers, price)


def _run(make: "Callable[[], ShardWork]", manifest: "Manifest", out: str, store: "ObjectStore", pool: "Pool") -> None:
    from isthmus.bootstrap.stage import run_stage
    from isthmus.cluster.cli.train import log_to_terminal

    def show(now: "Progress") -> None:
        typer.echo(now.line(), err=True)

    log_to_terminal()
    layer = run_stage(make(), manifest, out, store, pool, show)
    typer.echo(f"{layer.url}: {manifest.num_samples:,} images, {layer.hash[:16]}")
