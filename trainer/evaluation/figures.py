"""Figures for TensorBoard and for a gallery: samples with captions, attention heat maps, similarity matrices.

All take plain arrays and return uint8 [height, width, 3].
"""

import io
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

Picture = NDArray[np.uint8]
DPI = 100
LEAST_DIFFERENCE = 0.05
"""Of two attention maps, as a share of the largest weight, to be drawn side by side."""


def sample_grid(images: Sequence[Picture], true: Sequence[str], generated: Sequence[str], columns: int = 4) -> Picture:
    """Show images [height, width, 3] with their true and generated captions; a right one is green."""
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(3.0 * columns, 3.6 * rows), dpi=DPI, layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, image, truth, text in zip(axes, images, true, generated, strict=False):
        axis.imshow(image)
        colour = "darkgreen" if truth.strip() == text.strip() else "black"
        axis.set_title(f"{_wrapped(text)}\n({_wrapped(truth)})", fontsize=8, color=colour)
    return _pixels(figure)


def attention_map(image: Picture, weights_QP: NDArray[np.floating[Any]], title: str, num_queries: int = 4) -> Picture:
    """Show where queries look: the mean over all queries, then those that look hardest at one place.

    Where all look alike, single queries would be the mean again and are left out.

    Args:
        image: uint8 [height, width, 3].
        weights_QP: Cross-attention of each query over the image's patches; a leading class token is left out when the
            rest is a square.
        title: Text above.
        num_queries: Single queries shown.
    """
    grid_QHW = _as_grid(np.asarray(weights_QP, dtype=np.float64))
    hardest = np.argsort(-grid_QHW.reshape(len(grid_QHW), -1).max(axis=1))[:num_queries]
    panels = [("image", None), ("all queries", grid_QHW.mean(axis=0))]
    if np.abs(grid_QHW - grid_QHW.mean(axis=0)).max() > LEAST_DIFFERENCE * grid_QHW.max():
        panels += [(f"query {query}", grid_QHW[query]) for query in hardest]
    figure = Figure(figsize=(2.2 * len(panels), 2.7), dpi=DPI, layout="constrained")
    figure.suptitle(_wrapped(title, 90), fontsize=9)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    height, width = image.shape[:2]
    for axis, (name, grid_HW) in zip(axes, panels, strict=True):
        axis.imshow(image)
        if grid_HW is not None:
            axis.imshow(grid_HW, cmap="inferno", alpha=0.55, extent=(0, width, height, 0), interpolation="bilinear")
        axis.set_title(name, fontsize=8)
        axis.set_axis_off()
    return _pixels(figure)


def similarity_matrix(scores_IT: NDArray[np.floating[Any]], captions: Sequence[str]) -> Picture:
    """Show image-text similarities; the diagonal holds the true pairs."""
    figure = Figure(figsize=(8, 6.5), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    shown = axis.imshow(scores_IT, cmap="viridis")
    axis.set_ylabel("image")
    axis.set_xticks(range(len(captions)), [textwrap.shorten(text, 28) for text in captions], rotation=90, fontsize=7)
    axis.set_yticks(range(len(captions)), [textwrap.shorten(text, 28) for text in captions], fontsize=7)
    figure.colorbar(shown, label="cosine of the best query")
    return _pixels(figure)


def to_png(picture: Picture) -> bytes:
    """Return a picture as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", optimize=True)
    return file.getvalue()


def _as_grid(weights_QP: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return [queries, side, side]; patches that form no square become one row."""
    queries, patches = weights_QP.shape
    for skipped in (0, 1):
        side = round((patches - skipped) ** 0.5)
        if side * side == patches - skipped:
            return weights_QP[:, skipped:].reshape(queries, side, side)
    return weights_QP.reshape(queries, 1, patches)


def _wrapped(text: str, width: int = 36) -> str:
    return "\n".join(textwrap.wrap(text, width)[:3])


def _pixels(figure: Figure) -> Picture:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()
