"""`isthmus data`: make shards, index them, inspect them."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from isthmus.cluster.cli.options import (
    AddressOption,
    EndpointOption,
    JsonOption,
    RegionOption,
    find_run,
    open_runner,
    open_store,
)
from isthmus.cluster.cli.output import data_size, print_json, print_rich, progress, table

app = typer.Typer(help="Create, index and inspect shards.", no_args_is_help=True)

ManifestUrl = Annotated[
    str, typer.Argument(metavar="MANIFEST", help="URL of a manifest folder, as written by `isthmus data index`.")
]
Processes = Annotated[int, typer.Option("--processes", min=1, help="Local processes.")]
ADDRESS_HELP = "Run as tasks on this Ray cluster ('auto': this node's). Local paths must exist on all nodes."
Address = Annotated[str | None, typer.Option("--address", help=ADDRESS_HELP)]
CPUS = os.cpu_count() or 1

SOURCE_HELP = "Folder, .jsonl, .parquet, COCO captions, annotation list or evaluation set."
SourceArg = Annotated[Path, typer.Argument(metavar="SRC", help=SOURCE_HELP)]
KIND_HELP = "folder, jsonl, parquet, coco or annotations (default: guessed); karpathy, vqa or gqa."
KindOption = Annotated[str | None, typer.Option("--kind", help=KIND_HELP)]
IMAGES_HELP = "Base folder of relative image paths; paths must not leave it."
ImagesOption = Annotated[Path | None, typer.Option("--images", help=IMAGES_HELP)]
ANNOTATIONS_HELP = "With --kind vqa: the file with the answers."
AnnotationsOption = Annotated[Path | None, typer.Option("--annotations", help=ANNOTATIONS_HELP, exists=True)]
ImageColumn = Annotated[str | None, typer.Option("--image-column", help="Column with image bytes, path or URL.")]
PRIVATE_HELP = "Also download from addresses that are not public."
PrivateOption = Annotated[bool, typer.Option("--allow-private-addresses", help=PRIVATE_HELP)]


@app.command()
def index(
    urls: Annotated[
        list[str], typer.Argument(metavar="URL...", help="Shards: {00000..09999}, globs, folders, prefixes.")
    ],
    out: Annotated[str, typer.Option("--out", help="Folder URL of the manifest; run again to resume.")],
    chunk_mb: Annotated[float, typer.Option("--chunk-mb", help="Size of the chunks read at once, in MiB.")] = 16.0,
    on: Annotated[
        list[str] | None,
        typer.Option("--on", metavar="FAULT=drop|fail", help="Policy for a fault, or for `all` of them."),
    ] = None,
    processes: Processes = CPUS,
    address: Address = None,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check shards and write the manifest that runs read. Faulty samples are omitted and recorded."""
    from isthmus.data_pipeline.dataset.index_build import DROPPED, IndexOptions, build_manifest
    from isthmus.data_pipeline.dataset.shard_check import parse_policy
    from isthmus.data_pipeline.dataset.shard_urls import absolute, expand
    from isthmus.data_pipeline.store.object_store import join

    options = IndexOptions(chunk_bytes=max(1, int(chunk_mb * 2**20)), policy=parse_policy(on or []))
    store, out = open_store(endpoint_url, region), absolute(out.rstrip("/"))
    shards = expand(urls, store)
    with progress("shards", len(shards)) as advance:
        manifest, dropped = build_manifest(
            shards, out, store, options, open_runner(processes, address), on_shard=lambda _: advance()
        )
    facts: dict[str, Any] = {
        "manifest": out,
        "hash": manifest.hash,
        "shards": len(manifest.shards),
        "samples": manifest.num_samples,
        "chunks": len(manifest.chunk_samples),
        "bytes": sum(shard.size_bytes for shard in manifest.shards),
        "dropped": dict(dropped),
    }
    _print_facts(facts, join(out, DROPPED), as_json=as_json)


@app.command()
def verify(
    manifest: ManifestUrl,
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte and compare the checksums.")] = False,
    processes: Processes = CPUS,
    address: Address = None,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare shards and indexes with the manifest; exit code 2 if anything differs."""
    from isthmus.data_pipeline.dataset.manifest import Manifest
    from isthmus.data_pipeline.dataset.verify import verify as check
    from isthmus.data_pipeline.errors import DataError

    store = open_store(endpoint_url, region)
    loaded = Manifest.load(manifest, store)
    with progress("shards", len(loaded.shards)) as advance:
        problems = check(loaded, store, open_runner(processes, address), deep=deep, on_shard=advance)
    if as_json:
        print_json({"hash": loaded.hash, "shards": len(loaded.shards), "problems": problems})
    if problems:
        raise DataError(
            "\n".join([*problems[:20], f"{len(problems)} of {len(loaded.shards)} shards differ from the manifest"])
        )
    if not as_json:
        typer.echo(f"{len(loaded.shards)} shards, {loaded.num_samples} samples match the manifest ({loaded.hash[:16]})")


@app.command()
def show(
    manifest: ManifestUrl,
    sheet: Annotated[
        Path | None,
        typer.Option("--sheet", metavar="FILE.png", help="Also write an image of random samples with their captions."),
    ] = None,
    images: Annotated[int, typer.Option("--images", min=1, help="Number of samples on the sheet.")] = 24,
    captions: Annotated[
        int, typer.Option("--captions", min=1, help="Number of samples in the caption statistics.")
    ] = 200,
    seed: Annotated[int, typer.Option("--seed", help="Seed for choosing samples.")] = 0,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show counts, sizes and caption lengths, and optionally random samples."""
    from isthmus.data_pipeline.dataset.contact_sheet import contact_sheet
    from isthmus.data_pipeline.dataset.manifest import Manifest
    from isthmus.data_pipeline.dataset.preview import preview_samples, summarize

    store = open_store(endpoint_url, region)
    loaded = Manifest.load(manifest, store)
    samples = preview_samples(loaded, store, max(images, captions), seed)
    facts = summarize(loaded, samples)
    if sheet:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        sheet.write_bytes(contact_sheet(samples[:: max(1, len(samples) // images)][:images]))
        facts["sheet"] = str(sheet)
    if as_json:
        print_json(facts)
        return
    print_rich(table(None, _facts_of_set(facts)))
    typer.echo()
    print_rich(table(["words", "captions>", ""], _bars(facts["caption_words"])))


@app.command()
def ls(
    manifest: ManifestUrl, endpoint_url: EndpointOption = None, region: RegionOption = None, as_json: JsonOption = False
) -> None:
    """List the shards of a manifest, or the objects in any other folder."""
    from isthmus.data_pipeline.dataset.manifest import Manifest
    from isthmus.data_pipeline.errors import NotFoundError

    store = open_store(endpoint_url, region)
    try:
        shards = Manifest.load(manifest, store).shards
        rows: list[dict[str, Any]] = [
            {"url": shard.url, "bytes": shard.size_bytes, "samples": shard.num_samples, "etag": shard.etag}
            for shard in shards
        ]
    except NotFoundError:
        rows = [
            {"url": info.url, "bytes": info.size, "samples": None, "etag": info.etag} for info in store.list(manifest)
        ]
        if not rows:
            raise NotFoundError(f"there is nothing at {manifest}; check the URL and the endpoint") from None
    if as_json:
        print_json(rows)
        return
    for row in rows:
        samples = "" if row["samples"] is None else f"{row['samples']:>9} samples"
        typer.echo(f"{row['bytes']:>14} bytes {samples}  {row['url']}")


@app.command()
def where(
    keys: Annotated[list[str], typer.Argument(metavar="KEY...", help="source/shard#key, SHARD_URL#key or bare key.")],
    run: Annotated[str, typer.Option("--run", metavar="RUN", help="Run on the cluster, or URL of its folder.")],
    address: AddressOption = None,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show in which steps of a run samples were used and when they will be used next; steps count from 0."""
    from dataclasses import asdict

    from isthmus.cluster.submission.run_folder import stored_config
    from isthmus.cluster.submission.sample_uses import sample_uses

    url, store = find_run(run, address, endpoint_url, region)
    uses = sample_uses(stored_config(url, store), store, keys, url)
    if as_json:
        print_json([asdict(use) for use in uses])
        return
    columns = ("sample", "stage", "epoch>", "data step>", "step>", "row>", "")
    numbers = [[_number(value) for value in (use.epoch, use.data_step, use.step, use.row)] for use in uses]
    rows = [(use.sample, use.stage, *texts, use.state) for use, texts in zip(uses, numbers, strict=True)]
    print_rich(table(columns, rows))


@app.command()
def ingest(
    source: SourceArg,
    dest: Annotated[str, typer.Argument(metavar="DEST", help="Folder URL of the shards; run again to resume.")],
    kind: KindOption = None,
    images: ImagesOption = None,
    split: Annotated[str, typer.Option("--split", help="With --kind karpathy: train, restval, val or test.")] = "test",
    annotations: AnnotationsOption = None,
    image_column: ImageColumn = None,
    caption_column: Annotated[str | None, typer.Option("--caption-column", help="Column with the captions.")] = None,
    id_column: Annotated[str | None, typer.Option("--id-column", help="Column with the image id.")] = None,
    allow_private_addresses: PrivateOption = False,
    samples_per_shard: Annotated[int, typer.Option("--samples-per-shard", min=1)] = 10_000,
    processes: Processes = CPUS,
    address: Address = None,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write images with captions as WebDataset shards, ready for `isthmus data index`."""
    from isthmus.data_pipeline.dataset.shard_urls import absolute
    from isthmus.data_pipeline.ingest.records import Columns
    from isthmus.data_pipeline.ingest.shards import DROPPED
    from isthmus.data_pipeline.ingest.shards import ingest as write
    from isthmus.data_pipeline.ingest.sources import open_source
    from isthmus.data_pipeline.store.object_store import join

    columns = Columns(image_column, caption_column, id_column)
    opened = open_source(source, kind, images, columns, split=split, annotations=annotations)
    with progress("shards", None) as advance:
        summary = write(
            opened,
            absolute(dest.rstrip("/")),
            open_store(endpoint_url, region),
            open_runner(processes, address),
            samples_per_shard=samples_per_shard,
            allow_private=allow_private_addresses,
            on_shard=lambda _: advance(),
        )
    where_dropped = f"{join(summary.folder, DROPPED)}; it can be ingested like any .jsonl"
    _print_facts(vars(summary) | {"dropped": dict(summary.dropped)}, where_dropped, as_json=as_json)


def _number(value: int | None) -> str:
    return "" if value is None else str(value)


def _facts_of_set(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield label and text of what `data show` knows of a data set."""
    yield "samples", f"{facts['samples']:,} in {facts['shards']:,} shards, {facts['chunks']:,} chunks"
    yield "size", f"{data_size(facts['bytes'])}, {data_size(facts['bytes_per_sample'])} a sample"
    yield "images", f"{data_size(facts['image_bytes_median'])} (median)"
    yield "captions", f"{facts['captions_per_sample']} a sample"
    yield "hash", facts["hash"]
    if layer := facts.get("layer"):
        yield "layer", layer["url"]
        yield "of", layer["base_url"]
        yield "rule", json.dumps(layer["rule"])
    if "sheet" in facts:
        yield "sheet", facts["sheet"]


def _bars(counts: dict[str, int]) -> Iterator[tuple[str, str, str]]:
    longest = max(counts.values()) or 1
    for label, count in counts.items():
        yield label, f"{count:,}", "#" * round(40 * count / longest)


def _print_facts(facts: dict[str, Any], where_dropped: str, *, as_json: bool) -> None:
    """Print counts, and where dropped samples are listed if there are any."""
    if as_json:
        print_json(facts)
        return
    for name, value in facts.items():
        if value not in ([], {}):
            typer.echo(f"{name.replace('_', ' ')}: {value}")
    if facts["dropped"]:
        typer.echo(f"what was dropped, and why: {where_dropped}")
