"""`isthmus caption`, `ask`, `import`: use an exported model here; `isthmus models`: bring published ones to a store."""

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from isthmus.cluster.cli.options import EndpointOption, RegionOption, open_store

if TYPE_CHECKING:
    from torch import Tensor

    from isthmus.model.frozen.vision import VisionEncoder
    from isthmus.model.imports.published import Published

app = typer.Typer()

EXPORT_HELP = "Folder of an own export or made by `isthmus import`, or a run's folder (local or s3://)."
ExportArg = Annotated[str, typer.Argument(metavar="FOLDER_OR_RUN", help=EXPORT_HELP)]
ImageArg = Annotated[Path, typer.Argument(help="Picture file.", exists=True, dir_okay=False)]
BeamsOption = Annotated[int, typer.Option(help="Beams; 1: greedy.", min=1)]


@app.command()
def caption(
    export: ExportArg,
    images: Annotated[list[Path], typer.Argument(help="Picture files.", exists=True, dir_okay=False)],
    prompt: Annotated[str | None, typer.Option(help="Text to continue; default: that of training.")] = None,
    beams: BeamsOption = 5,
    max_new_tokens: Annotated[int, typer.Option(help="Longest caption, in tokens.", min=1)] = 30,
) -> None:
    """Write one caption per picture."""
    from isthmus.model.formats.assemble import load_captioner
    from isthmus.model.generate import Decoding
    from isthmus.model.generate import caption as write

    model, encoder = load_captioner(_folder(export))
    decoding = Decoding(max_new_tokens=max_new_tokens, num_beams=beams)
    for path, text in zip(
        images, write(model, encoder, _pixels(images, model.vision), prompt=prompt, decoding=decoding), strict=True
    ):
        typer.echo(f"{path}: {text}" if len(images) > 1 else text)


@app.command()
def ask(export: ExportArg, image: ImageArg, question: Annotated[str, typer.Argument(help="Question.")]) -> None:
    """Answer a question about a picture."""
    from isthmus.model.formats.assemble import load_captioner
    from isthmus.model.generate import answer

    model, encoder = load_captioner(_folder(export))
    typer.echo(answer(model, encoder, _pixels([image], model.vision), [question])[0])


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="transformers' Blip2ForConditionalGeneration folder.", exists=True)],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
) -> None:
    """Turn a published BLIP-2 folder into an own export that can be continued and asked."""
    from isthmus.model.formats.hf_import import import_captioner

    import_captioner(source, target)
    typer.echo(f"{target}: written; try: isthmus caption {target} PICTURE")


def _folder(place: str) -> Path:
    """Return the local folder of an export: `place` itself, or the export of the run that `place` is."""
    from isthmus.data_pipeline.store.object_store import NotFoundError, ObjectStore, join
    from isthmus.trainer.frozen.node_cache import local_folder
    from isthmus.trainer.runs.export import EXPORT
    from isthmus.trainer.runs.store import RUN

    store = ObjectStore()
    try:
        store.head(join(place, RUN))
    except NotFoundError:
        return local_folder(place.rstrip("/"), store)
    return local_folder(join(place, EXPORT), store)


def _pixels(paths: list[Path], vision: "VisionEncoder | None") -> "Tensor":
    """Return pictures resized to the encoder's square (bicubic) and normalised: B, C, H, W."""
    import numpy as np
    import torch
    from PIL import Image as Pictures

    assert vision is not None
    side = vision.config.image_size_pixels
    opened = [Pictures.open(path).convert("RGB").resize((side, side), Pictures.Resampling.BICUBIC) for path in paths]
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in opened])).permute(0, 3, 1, 2) / 255.0
    mean, std = (torch.tensor(x)[:, None, None] for x in (vision.image_mean, vision.image_std))
    return (pixels - mean) / std


models_app = typer.Typer(
    help="Bring published models to where runs read them, and check what is there.", no_args_is_help=True
)

Part = Literal["auto", "vision", "language"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
FolderArgument = Annotated[str, typer.Argument(metavar="FOLDER", help="Local folder or s3:// URL.")]


@models_app.command()
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
        model, commit = _open_source(source, revision, part, Path(scratch))
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
    typer.echo(f"{destination}: {record.num_parameters:,} parameters, {size / 1e9:.2f} GB, {len(record.files)} files")


@models_app.command()
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


@models_app.command()
def verify(folder: FolderArgument, endpoint_url: EndpointOption = None, region: RegionOption = None) -> None:
    """Read every file of a model folder and compare it with the recorded SHA-256."""
    from isthmus.trainer.frozen.model_folder import verify as verify_folder

    record = verify_folder(folder, open_store(endpoint_url, region))
    typer.echo(f"{folder}: {len(record.files)} files are as recorded ({record.source})")


def _open_source(source: str, revision: str | None, part: Part, scratch: Path) -> "tuple[Published, str | None]":
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
