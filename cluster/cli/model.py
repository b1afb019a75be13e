"""`isthmus caption`, `ask`, `serve`, `import`: use exported models; `isthmus models`: fetch published ones."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from isthmus.cluster.cli.options import EndpointOption, RegionOption, RunFolderArg, open_store
from isthmus.cluster.cli.output import data_size, print_rich, table

if TYPE_CHECKING:
    from isthmus.model.imports.published import Published

app = typer.Typer()

ExportFormat = Literal["auto", "hf", "own", "lavis"]
Part = Literal["auto", "vision", "language"]
EXPORT_HELP = "Export (native or for transformers), output of `isthmus import`, or a run's folder (local or s3://)."
ExportArg = Annotated[str, typer.Argument(metavar="FOLDER_OR_RUN", help=EXPORT_HELP)]
ImageArg = Annotated[Path, typer.Argument(help="Image file.", exists=True, dir_okay=False)]
BeamsOption = Annotated[int, typer.Option(help="Number of beams; 1 is greedy search.", min=1)]


@app.command()
def caption(
    export: ExportArg,
    images: Annotated[list[Path], typer.Argument(help="Image files.", exists=True, dir_okay=False)],
    prompt: Annotated[str | None, typer.Option(help="Text to continue (default: as in training).")] = None,
    beams: BeamsOption = 5,
    max_new_tokens: Annotated[int, typer.Option(help="Longest caption, in tokens.", min=1)] = 30,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
) -> None:
    """Write one caption per image."""
    from isthmus.cluster.captioner import Captioner
    from isthmus.model.decoding import Decoding

    captioner = Captioner.open(export, open_store(endpoint_url, region))
    decoding = Decoding(max_new_tokens=max_new_tokens, num_beams=beams)
    texts = captioner.write([path.read_bytes() for path in images], [prompt] * len(images), decoding)
    for path, text in zip(images, texts, strict=True):
        typer.echo(f"{path}: {text}" if len(images) > 1 else text)


@app.command()
def ask(
    export: ExportArg,
    image: ImageArg,
    question: Annotated[str, typer.Argument(help="Question.")],
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
) -> None:
    """Answer a question about an image."""
    from isthmus.cluster.captioner import Captioner
    from isthmus.model.generate import ANSWER_DECODING, QUESTION

    captioner = Captioner.open(export, open_store(endpoint_url, region))
    typer.echo(captioner.write([image.read_bytes()], [QUESTION.format(question)], ANSWER_DECODING)[0])


@app.command()
def serve(
    export: ExportArg,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    max_batch: Annotated[int, typer.Option(help="Largest number of requests in a batch.", min=1)] = 8,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
) -> None:
    """Serve an OpenAI-compatible chat API with images; the API key is ISTHMUS_SERVE_TOKEN."""
    import os
    import secrets

    from aiohttp import web

    from isthmus.cluster.captioner import Captioner
    from isthmus.cluster.serving import Server

    token = os.environ.get("ISTHMUS_SERVE_TOKEN") or secrets.token_urlsafe(24)
    captioner = Captioner.open(export, open_store(endpoint_url, region))
    server = Server(captioner, name=export.rstrip("/").rpartition("/")[2], token=token, max_batch=max_batch)
    typer.echo(f"http://{host}:{port}/v1", err=True)
    if "ISTHMUS_SERVE_TOKEN" not in os.environ:
        typer.echo(f"API key: {token}", err=True)
    web.run_app(server.app(), host=host, port=port, print=None)


@app.command("import")
def import_(
    source: Annotated[
        Path, typer.Argument(help="BLIP-2 folder in transformers format, or LAVIS .pth file.", exists=True)
    ],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    vision: Annotated[
        Path | None, typer.Option(help="LAVIS: folder of the encoder [default: the one in the file].", exists=True)
    ] = None,
    language: Annotated[
        Path | None, typer.Option(help="LAVIS: folder of the language model, for captioning.", exists=True)
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="LAVIS: folder of BERT's vocabulary, for exports to transformers.", exists=True)
    ] = None,
) -> None:
    """Convert a published BLIP-2 of either stage to a native export; list the tensors taken, new and ignored."""
    from isthmus.model.formats.hf_import import import_blip2
    from isthmus.model.formats.key_mapping import by_layer
    from isthmus.model.formats.lavis import import_lavis

    if source.is_dir():
        imported = import_blip2(source, target)
    else:
        imported = import_lavis(source, target, vision, language, tokenizer)
    groups = {"taken": imported.taken, "new, initialised where a stage has them": imported.new, "left": imported.left}
    for label, names in groups.items():
        typer.echo(f"{label}: {len(names)} tensors")
        for name, count in by_layer(names).items():
            typer.echo(f"  {name}" + (f" ({count} layers)" if count > 1 else ""))
    typer.echo(f"{target}: written, trained tensors as {', '.join(imported.dtypes)}; training takes them as float32")


@app.command("export")
def export_(
    run: RunFolderArg,
    destination: Annotated[str, typer.Argument(help="New folder: a local path or s3:// URL.")],
    to: Annotated[ExportFormat, typer.Option(help="Format; auto: hf if transformers supports the encoder.")] = "auto",
    stage: Annotated[Literal["stage1", "stage2"] | None, typer.Option(help="Stage (default: the last one).")] = None,
    step: Annotated[int | None, typer.Option(help="Step of the checkpoint (default: the newest).")] = None,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
) -> None:
    """Export a checkpoint of a finished or active run as a model folder, or a native export for transformers."""
    from isthmus.cluster.submission.run_folder import stored_config
    from isthmus.model.errors import ModelError
    from isthmus.model.formats.hf_export import export_native
    from isthmus.model.formats.native import DESCRIPTION
    from isthmus.trainer.runs.export import export_checkpoint

    if (Path(run) / DESCRIPTION).exists():
        if to not in ("auto", "hf"):
            raise ModelError(f"{run}: a native export, not a run; it can be exported with --to hf")
        export_native(Path(run), Path(destination))
        typer.echo(f"{destination}: {run}")
        return
    store = open_store(endpoint_url, region)
    config = stored_config(run, store)
    typer.echo(f"{destination}: {export_checkpoint(config, store, run, destination, stage=stage, step=step, form=to)}")


@app.command()
def push(
    export: Annotated[Path, typer.Argument(help="Local folder of an export.", exists=True, file_okay=False)],
    name: Annotated[str, typer.Argument(help="Name on the Hugging Face Hub, owner/name.")],
    public: Annotated[bool, typer.Option("--public", help="Make it public (default: private).")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be uploaded.")] = False,
) -> None:
    """Upload an export with its model card to the Hugging Face Hub; the token is HF_TOKEN."""
    from isthmus.model.imports.hub import upload

    files = sorted(path for path in export.rglob("*") if path.is_file())
    for path in files if dry_run else ():
        typer.echo(f"{path.stat().st_size:>14,}  {path.relative_to(export)}")
    size = sum(path.stat().st_size for path in files)
    if dry_run:
        typer.echo(f"{name}: {len(files)} files, {data_size(size)}, {'public' if public else 'private'}; not uploaded")
        return
    typer.echo(upload(export, name, private=not public))


models_app = typer.Typer(help="Convert and check published models.", no_args_is_help=True)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
PLACE_HELP = "local folder, s3:// URL, or name on the Hugging Face Hub."
FolderArgument = Annotated[str, typer.Argument(metavar="FOLDER", help="Local folder or s3:// URL.")]


@models_app.command()
def get(
    source: Annotated[str, typer.Argument(help="Name on the Hugging Face Hub, folder, .gguf file or LAVIS .pth file.")],
    destination: Annotated[str, typer.Argument(help="Folder to write: a local path or s3:// URL.")],
    part: Annotated[Part, typer.Option(help="Part of a model that has several; auto: the only one.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights; auto: as published.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
) -> None:
    """Convert a published model to a verified safetensors folder; run again to resume."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from isthmus.model.imports.architecture import check_architecture
    from isthmus.trainer.frozen.model_folder import ModelWriter
    from isthmus.trainer.frozen.scratch import scratch_folder

    with scratch_folder("isthmus-gguf-") as scratch:
        model, commit = _open_source(source, revision, part, scratch)
        check_architecture(model, source)
        columns = (TextColumn("weight files"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, transient=True, disable=not sys.stderr.isatty()) as progress:
            task = progress.add_task("")
            writer = ModelWriter(
                open_store(endpoint_url, region),
                destination,
                dtype,
                on_file=lambda done, of: progress.update(task, completed=done, total=of),
            )
            record = writer.write(model, source, commit, part)
    size = sum(file.size for file in record.files.values())
    typer.echo(f"{destination}: {record.num_parameters:,} parameters, {data_size(size)}, {len(record.files)} files")


@models_app.command()
def show(folder: FolderArgument, endpoint_url: EndpointOption = None, region: RegionOption = None) -> None:
    """Show what a model folder contains and where it came from."""
    from isthmus.trainer.errors import TrainerError
    from isthmus.trainer.frozen.model_folder import RECORD, read_record

    record = read_record(folder, open_store(endpoint_url, region))
    if record is None:
        raise TrainerError(f"{folder}: no {RECORD}; only folders made by `isthmus models get` have one")
    revision = f" at {record.revision}" if record.revision else ""
    typer.echo(f"source      {record.source}{revision}")
    typer.echo(f"part        {record.part}")
    typer.echo(f"parameters  {record.num_parameters:,}")
    typer.echo(f"dtype       {record.dtype}")
    for name, file in record.files.items():
        typer.echo(f"{file.size:>14,}  {file.sha256[:12]}  {name}")


@models_app.command()
def verify(folder: FolderArgument, endpoint_url: EndpointOption = None, region: RegionOption = None) -> None:
    """Read every file of a model folder and compare it with the recorded SHA-256."""
    from isthmus.trainer.frozen.model_folder import verify as verify_folder

    record = verify_folder(folder, open_store(endpoint_url, region))
    typer.echo(f"{folder}: {len(record.files)} files match the record ({record.source})")


@models_app.command()
def check(
    language: Annotated[str, typer.Argument(metavar="LLM", help=f"Language model: {PLACE_HELP}")],
    vision: Annotated[str | None, typer.Option(help=f"Image encoder: {PLACE_HELP}")] = None,
    bert: Annotated[str | None, typer.Option(help=f"BERT for the Q-Former: {PLACE_HELP}")] = None,
    recipe: Annotated[Path, typer.Option(help="Recipe that they must fit.")] = Path("blip2-vitg-opt2.7b.yaml"),
    gpu: Annotated[str, typer.Option(help="Card, as for `isthmus estimate`.")] = "h100",
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 8,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
) -> None:
    """Check whether models fit each other and a recipe, without reading weights; exit code 2 if not."""
    from isthmus.cluster.checks.model_headers import open_headers
    from isthmus.cluster.checks.models import ModelChecks
    from isthmus.cluster.config import JobConfig
    from isthmus.trainer.config.loading import load_config
    from isthmus.trainer.estimate.hardware import Cluster, find_gpu

    store = open_store(endpoint_url, region)
    found = {"language": open_headers(language, store)}
    if vision:
        found["vision"] = open_headers(vision, store, "vision")
    overrides = [f"model.{part}.path={json.dumps(str(headers.folder))}" for part, headers in found.items()]
    checks = ModelChecks(load_config(recipe, overrides, JobConfig))
    checks.add_language(found["language"])
    if vision:
        checks.add_vision(found["vision"])
    if bert:
        checks.add_bert(open_headers(bert, store))
    checks.add_steps()
    checks.add_memory(Cluster(find_gpu(gpu), gpus))
    typer.echo(f"for {recipe.name}")
    print_rich(table(("part", "", "found"), checks.rows))
    for misfit in checks.misfits:
        typer.echo(misfit, err=True)
    if checks.misfits:
        raise typer.Exit(2)


def _open_source(source: str, revision: str | None, part: Part, scratch: Path) -> "tuple[Published, str | None]":
    """Open a local model, or fetch it from the Hub; return it and the commit it is of."""
    from isthmus.model.imports.gguf import SUFFIX, open_gguf
    from isthmus.model.imports.hub import download
    from isthmus.model.imports.published import open_published

    place = Path(source)
    if place.suffix == SUFFIX:
        return open_gguf(place, scratch), None
    if place.exists() or source.startswith((".", "/")):
        return open_published(place, part), None
    snapshot = download(source, revision)
    return open_published(snapshot.folder, part), snapshot.revision
