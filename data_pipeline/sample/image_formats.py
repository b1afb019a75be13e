"""Which members of a sample are images, and which formats are decoded."""

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"})
"""Extensions, lower case and without the dot, of the members that are taken for the image."""
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What Pillow may decode, whatever the name says: some other formats start programs (EPS starts Ghostscript)."""
