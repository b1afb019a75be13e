"""What Pillow may take a file for, whatever its name says."""

PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Others are refused: some start programs (EPS starts Ghostscript), few are ever tested with damaged files."""
