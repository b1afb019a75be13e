"""The image formats that are read: what Pillow calls them and how their files are named."""

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
"""What Pillow may take a file for, whatever its name says. Others are refused: some start programs (EPS starts
Ghostscript), few are ever tested with damaged files."""

IMAGE_EXTENSIONS = frozenset(extension for extensions in EXTENSIONS.values() for extension in extensions)
"""Extensions, in lower case, of the members and files that are images."""


def usual_extension(pillow_format: str | None) -> str | None:
    """Return the file extension of a format as Pillow names it; None: it is not read."""
    # A multi-picture JPEG, as cameras write it, is opened by Pillow's JPEG plugin and called MPO.
    known = EXTENSIONS.get("JPEG" if pillow_format == "MPO" else pillow_format or "")
    return known[0] if known else None
