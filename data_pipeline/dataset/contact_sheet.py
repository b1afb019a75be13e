"""A contact sheet of samples with their captions."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from isthmus.data_pipeline.dataset.preview import PreviewSample
from isthmus.data_pipeline.errors import BadSample
from isthmus.data_pipeline.sample.images import decode_image

_TILE_PIXELS = 160
_TEXT_PIXELS = 44
_LETTERS_PER_LINE, _LETTER_PIXELS = 26, 10
_MAX_PIXELS = 64_000_000


def contact_sheet(samples: Sequence[PreviewSample], columns: int = 6) -> bytes:
    """Return a PNG of the samples with their first captions."""
    columns = max(1, min(columns, len(samples)))
    rows = -(-len(samples) // columns)
    height = _TILE_PIXELS + _TEXT_PIXELS
    sheet = Image.new("RGB", (columns * _TILE_PIXELS, max(rows, 1) * height), "white")
    draw, font = ImageDraw.Draw(sheet), _font()
    for i, sample in enumerate(samples):
        left, top = i % columns * _TILE_PIXELS, i // columns * height
        tile = _thumbnail(sample.image)
        sheet.paste(tile, (left + (_TILE_PIXELS - tile.width) // 2, top + (_TILE_PIXELS - tile.height) // 2))
        text = " ".join(sample.captions[0].split())
        lines = textwrap.wrap(text, _LETTERS_PER_LINE, max_lines=3, placeholder=" ...")
        draw.multiline_text((left + 4, top + _TILE_PIXELS), "\n".join(lines), fill="black", spacing=2, font=font)
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()


def _font() -> ImageFont.FreeTypeFont:
    """Return matplotlib's font, which has Latin, Greek and Cyrillic letters; Pillow's own has Latin only."""
    from matplotlib import get_data_path  # noqa: PLC0415 - slow to import

    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), _LETTER_PIXELS)


def _thumbnail(data: bytes) -> Image.Image:
    """Decode as the readers do; a sample that they would mask is a grey tile."""
    try:
        tile = Image.fromarray(decode_image(data, _MAX_PIXELS))
    except BadSample:
        tile = Image.new("RGB", (_TILE_PIXELS, _TILE_PIXELS), "grey")
    tile.thumbnail((_TILE_PIXELS - 8, _TILE_PIXELS - 8))
    return tile
