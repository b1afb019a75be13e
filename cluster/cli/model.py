"""`isthmus caption`, `ask`, `import`: use an exported model on this machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from isthmus.model.frozen.vision import VisionEncoder

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
