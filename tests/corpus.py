"""Small tar shards of random JPEG, PNG and WebP images with captions."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

FORMATS = ("jpg", "png", "webp")
_PILLOW_NAMES = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


def picture(number: int, extension: str = "jpg", size: tuple[int, int] = (48, 40)) -> bytes:
    """An encoded image that is a function of its number: a smooth gradient, easily told from its neighbours."""
    generator = np.random.default_rng(number)
    coarse = generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(size).save(file, _PILLOW_NAMES[extension], quality=90)
    return file.getvalue()


def sample(number: int) -> dict[str, bytes]:
    """Members by extension: every third sample has three captions in `.json`, the others one in `.txt`."""
    extension = FORMATS[number % len(FORMATS)]
    members = {extension: picture(number, extension)}
    if number % 3 == 2:
        captions = [f"caption {choice} of picture {number}" for choice in range(3)]
        members["json"] = json.dumps({"captions": captions, "image_id": f"image-{number}"}).encode()
    else:
        members["txt"] = f"a picture numbered {number}".encode()
    return members


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """Write a tar of named members, in the order given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def named_members(numbers) -> list[tuple[str, bytes]]:
    """Members of several samples, named as in a shard."""
    return [(f"{number:06d}.{ext}", data) for number in numbers for ext, data in sample(number).items()]


def write_shards(folder: Path, samples_per_shard: list[int]) -> list[Path]:
    """Write shards 00000.tar, 00001.tar, ... with consecutive samples."""
    paths, first = [], 0
    for shard, count in enumerate(samples_per_shard):
        paths.append(write_tar(folder / f"{shard:05d}.tar", named_members(range(first, first + count))))
        first += count
    return paths
