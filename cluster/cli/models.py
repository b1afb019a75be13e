"""`isthmus models`: bring published models to where runs read them, and check what is there."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from isthmus.cluster.cli.options import EndpointOption, RegionOption, open_store

if TYPE_CHECKING:
    from isthmus.model.imports.published import Published

app = typer.Typer(help="Bring published models to where runs read them, and check what is there.", no_args_is_help=True)

Part = Literal["auto", "vision", "language"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
FolderArgument = Annotated[str, typer.Argument(metavar="FOLDER", help="Local folder or s3:// URL.")]


@app.command()
def get(
    source: Annotated[str, typer.Argument(help="Name on the Hugging Face Hub, folder, .gguf file or LAVIS .pth file.")],
    destination: Annotated[str, typer.Argument(help="Folder to write: a local path or s3:// URL.")],
    part: Annotated[Part, typer.Option(help="Which part of a model of several; auto: the only one.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights; auto: as published.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
) -> None:
    """Convert a published model to a checked safetensors folder; an interrupted call resumes."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from isthmus.model.imports.architecture import check_architecture
    from isthmus.trainer.frozen.model_folder import ModelWriter

    with tempfile.TemporaryDirectory(prefix="isthmus-gguf-") as scratch:
        model, commit = _open(source, revision, part, Path(scratch))
        check_architecture(model, source)
        columns = (TextColumn("weight files"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, transient=True, disable=None) as progress:
            task = progress.add_task("")
            writer = ModelWriter(
                open_store(endpoint_url, region),
                destination,
                dtype,
                on_file=lambda done, of: progress.update(task, completed=done, total=of),
            )
            record = writer.write(model, source, commit, part)
    size = sum(file.size for file in record.files.values())
    typer.echo(f"{destination}: {record.num_parameters:,} parameters, {size / 1e9:.2f} GB, {len(record.files)} files")


@app.command()
def show(folder: FolderArgument, endpoint_url: EndpointOption = None, region: RegionOption = None) -> None:
    """Say what a model folder holds and where it came from."""
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


@app.command()
def verify(folder: FolderArgument, endpoint_url: EndpointOption = None, region: RegionOption = None) -> None:
    """Read every file of a model folder and compare it with the recorded SHA-256."""
    from isthmus.trainer.frozen.model_folder import verify as verify_folder

    record = verify_folder(folder, open_store(endpoint_url, region))
    typer.echo(f"{folder}: {len(record.files)} files are as recorded ({record.source})")


def _open(source: str, revision: str | None, part: Part, scratch: Path) -> "tuple[Published, str | None]":
    """Open a local model, or fetch it from the Hub; return it and the commit it is of."""
    from isthmus.model.formats.gguf_import import convert_gguf
    from isthmus.model.imports.hub import download
    from isthmus.model.imports.published import open_published

    place = Path(source)
    if place.suffix == ".gguf":
        convert_gguf(place, scratch / "model")
        return open_published(scratch / "model"), None
    if place.exists() or source.startswith((".", "/")):
        return open_published(place, part), None
    snapshot = download(source, revision)
    return open_published(snapshot.folder, part), snapshot.revision
