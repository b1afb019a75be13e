"""The encoded image of a record: from the record itself, the web, an object store or a local file."""

import asyncio
import io
import stat
from pathlib import Path

from PIL import Image

from isthmus.data_pipeline.errors import AccessError, BadSample, ChangedError, NotFoundError
from isthmus.data_pipeline.ingest.download import MAX_IMAGE_BYTES, Downloader
from isthmus.data_pipeline.sample.image_formats import PILLOW_FORMATS, usual_extension
from isthmus.data_pipeline.store.object_store import ObjectStore


async def read_image(image: bytes | str, store: ObjectStore, downloader: Downloader) -> bytes:
    """Return the encoded image.

    Raises:
        BadSample: it is missing, refused, too large or cannot be read.
        StoreError: the object store does not answer.
    """
    if isinstance(image, bytes):
        return image
    scheme = image.partition("://")[0].lower() if "://" in image else ""
    if scheme in ("http", "https"):
        return await downloader.get(image)
    if scheme == "s3":
        return await asyncio.to_thread(_from_store, image, store)
    return await asyncio.to_thread(_from_file, Path(image.removeprefix("file://")))


def image_extension(data: bytes) -> str:
    """Return the file extension of an encoded image by its content.

    Raises:
        BadSample: its header is unreadable, or its format is not supported.
    """
    try:
        with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
            extension = usual_extension(image.format)
    except Exception as error:  # decoders of damaged files raise anything
        raise BadSample("undecodable_image", type(error).__name__) from error
    if extension is None:
        raise BadSample("undecodable_image", f"format {image.format} is not supported")
    return extension


def _from_store(url: str, store: ObjectStore) -> bytes:
    try:
        info = store.head(url)
        _check_size(info.size)
        return bytes(store.get_range(url, 0, info.size, etag=info.etag))
    except NotFoundError as error:
        raise BadSample("image_missing", str(error)) from error
    except (AccessError, ChangedError) as error:
        raise BadSample("image_unreadable", str(error)) from error


def _from_file(path: Path) -> bytes:
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise BadSample("image_missing", "it is not a regular file")
        _check_size(about.st_size)
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a NUL in the path
        raise BadSample("image_missing", str(error)) from error
    except OSError as error:
        raise BadSample("image_unreadable", str(error)) from error


def _check_size(num_bytes: int) -> None:
    if num_bytes > MAX_IMAGE_BYTES:
        raise BadSample("image_too_large", f"{num_bytes} bytes, at most {MAX_IMAGE_BYTES}")
