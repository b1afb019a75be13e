"""The image formats that are read: what Pillow calls them and how their files are named."""

from collections.abc import Iterable

EXTENSIONS = {
    "JPEG": ("jpg", "jpeg"),
    "PNG": ("png",),
    "WEBP": ("webp",),
    "GIF": ("gif",),
    "BMP": ("bmp",),
    "TIFF": ("tiff", "tif"),
}
"""Pillow's name of each format and its file extensions, the usual one first."""

PILLOW_FORMATS = tuple(EXTENSIONS)
"""Formats that Pillow may detect, regardless of the file's name. Others are refused: some start programs (EPS starts
Ghostscript), few are ever tested with damaged files."""

IMAGE_EXTENSIONS = tuple(extension for extensions in EXTENSIONS.values() for extension in extensions)
"""Extensions, in lower case, of the members and files that are images, in the order in which they are preferred."""


def picture_extension(extensions: Iterable[str]) -> str | None:
    """Return which of a sample's extensions is its picture; None if it has none.

    A JPEG comes before a PNG, which may be a mask or a depth map of it.
    """
    return min((found for found in extensions if found in IMAGE_EXTENSIONS), key=IMAGE_EXTENSIONS.index, default=None)


def usual_extension(pillow_format: str | None) -> str | None:
    """Return the file extension of a format as Pillow names it; None if it is not read."""
    # A multi-picture JPEG, as cameras write it, is opened by Pillow's JPEG plugin and called MPO.
    known = EXTENSIONS.get("JPEG" if pillow_format == "MPO" else pillow_format or "")
    return known[0] if known else None
