"""`isthmus assets`: make inputs that need no download."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Make inputs that need no download.", no_args_is_help=True)


@app.command()
def tiny(
    folder: Annotated[Path, typer.Argument(help="Local folder that is made.")] = Path("assets/tiny"),
    train: Annotated[int, typer.Option(help="Training pairs.")] = 2000,
    held_out: Annotated[int, typer.Option(help="Held-out pairs.")] = 96,
) -> None:
    """Write generated scenes with manifests, and tiny random frozen models: all that recipes/tiny.yaml needs."""
    from isthmus.demo.tiny.assets import write_tiny_assets

    write_tiny_assets(folder, train, held_out)
    typer.echo(f"{folder}: {train} training and {held_out} held-out pairs, vision encoder, vocabulary, OPT, T5")
    typer.echo("  isthmus train recipes/tiny.yaml --local")
