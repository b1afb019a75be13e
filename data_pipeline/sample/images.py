"""From encoded image to uint8 RGB square: decoding, random resized crop, antialiased bicubic resizing.

JPEG goes through libjpeg-turbo (simplejpeg) and torch's uint8 channels-last resize, about twice as fast as Pillow
(docs/benchmarks/data.md). Everything else, and every unusual JPEG, goes through Pillow.
"""

import io
import math
from collections.abc import Iterator

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from isthmus.data_pipeline.errors import BadSample
from isthmus.data_pipeline.sample.image_formats import PILLOW_FORMATS

UInt8Array = NDArray[np.uint8]
Box = tuple[int, int, int, int]

_MIN_SIDE_PIXELS = 2
_CROP_ATTEMPTS = 10
_LOG_ASPECT_RANGE = (math.log(3 / 4), math.log(4 / 3))
_ORIENTATION_MARKS = (b"Exif\0\0", b"tiff:Orientation")  # of EXIF and of XMP, wherever their segments lie


def decode_image(data: bytes | memoryview, max_pixels: int) -> UInt8Array:
    """Decode an image to RGB, shape (height, width, 3): upright, first frame, transparency on white.

    Raises:
        BadSample: undecodable, more than `max_pixels`, or a side of one pixel.
    """
    if bytes(data[:3]) == b"\xff\xd8\xff":
        image = _decode_jpeg(data, max_pixels)
        if image is not None:
            return image
    return _decode_with_pillow(data, max_pixels)


def random_resized_crop_box(height: int, width: int, scale: tuple[float, float], uniform: Iterator[float]) -> Box:
    """Return (top, left, height, width) of a crop with random area and aspect ratio 3/4 to 4/3.

    The sampling rule is torchvision's RandomResizedCrop (after Szegedy et al., 2014): ten tries, then the central crop
    of the nearest allowed aspect ratio. `uniform` yields floats in [0, 1).
    """
    low, high = _LOG_ASPECT_RANGE
    for _ in range(_CROP_ATTEMPTS):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * next(uniform))
        aspect = math.exp(low + (high - low) * next(uniform))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(next(uniform) * (height - crop_height + 1))
            left = int(next(uniform) * (width - crop_width + 1))
            return top, left, crop_height, crop_width
    aspect = min(max(width / height, 3 / 4), 4 / 3)
    crop_width, crop_height = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def resize_square(image: UInt8Array, box: Box, size: int) -> UInt8Array:
    """Cut a box (top, left, height, width) out of (H, W, 3) and resize it to (size, size, 3), antialiased bicubic."""
    top, left, height, width = box
    # The batch dimension comes before the permutation: only so are one image's strides channels-last to torch, and the
    # crop is read in place and written in the layout of the result, without a copy.
    crop_BHWC = torch.from_numpy(image)[None, top : top + height, left : left + width]
    resized_BCHW = torch.nn.functional.interpolate(
        crop_BHWC.permute(0, 3, 1, 2), size=(size, size), mode="bicubic", antialias=True, align_corners=False
    )
    return resized_BCHW[0].permute(1, 2, 0).numpy()


def resize_whole(image: UInt8Array, size: int) -> UInt8Array:
    """Resize a whole image (H, W, 3) to (size, size, 3), whatever its aspect ratio."""
    return resize_square(image, (0, 0, *image.shape[:2]), size)


def _decode_jpeg(data: bytes | memoryview, max_pixels: int) -> UInt8Array | None:
    """Decode an ordinary JPEG; None where Pillow must do it: four components, a rotation flag, a decoding error."""
    try:
        height, width, colour_space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_size(height, width, max_pixels)
    if colour_space in ("CMYK", "YCCK") or _is_rotated(data):
        return None
    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB")  # type: ignore[no-any-return]
    except ValueError:
        return None


def _is_rotated(data: bytes | memoryview) -> bool:
    """Return whether EXIF or XMP data, if present, require a rotation or a mirror image."""
    encoded = bytes(data)
    if not any(mark in encoded for mark in _ORIENTATION_MARKS):
        return False
    try:
        with Image.open(io.BytesIO(encoded), formats=PILLOW_FORMATS) as image:
            return bool(image.getexif().get(ExifTags.Base.Orientation, 1) != 1)
    except Exception:  # noqa: BLE001 - damaged metadata raise anything; decoding with Pillow names the cause
        return True


def _decode_with_pillow(data: bytes | memoryview, max_pixels: int) -> UInt8Array:
    try:
        with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
            _check_size(image.height, image.width, max_pixels)
            return np.array(_to_rgb(ImageOps.exif_transpose(image)))  # a copy: the view of Pillow is read-only
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample("too_many_pixels", str(error)) from error
    except Exception as error:  # decoders of damaged files raise anything
        raise BadSample("undecodable_image", f"{type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB: 16 bits to 8 by dropping the low byte, transparency composed on white."""
    transparent = image.info.get("transparency")
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).clip(0, 65535)
        return _on_white((grey >> 8).astype(np.uint8), None if transparent is None else grey == transparent)
    if image.mode == "F":
        return _on_white(_float_to_uint8(np.asarray(image)), None)
    if isinstance(transparent, tuple) and max(transparent) > 255:  # 16 bits per channel, of which Pillow keeps 8
        pixels = np.asarray(image)
        return _on_white(pixels, (pixels == [value >> 8 for value in transparent]).all(axis=-1))
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        return opaque.convert("RGB")
    return image.convert("RGB")


def _on_white(pixels: UInt8Array, transparent: NDArray[np.bool_] | None) -> Image.Image:
    """Return grey (H, W) or RGB (H, W, 3) pixels as an RGB image, white where they are transparent."""
    image = Image.fromarray(pixels).convert("RGB")
    if transparent is not None:
        image.paste("white", mask=Image.fromarray(transparent))
    return image


def _float_to_uint8(pixels: NDArray[np.float32]) -> UInt8Array:
    """Scale 0..1 to 0..255 where nothing is larger than 1; otherwise take the values as 0..255. NaN is 0."""
    pixels = np.nan_to_num(pixels, nan=0.0)
    scale = 255.0 if pixels.max(initial=0.0) <= 1.0 else 1.0
    return (pixels * scale).clip(0, 255).round().astype(np.uint8)


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise BadSample("too_many_pixels", f"{width} x {height} pixels, at most {max_pixels} (data.max_image_pixels)")
    if min(height, width) < _MIN_SIDE_PIXELS:
        raise BadSample("image_too_small", f"{width} x {height} pixels")
