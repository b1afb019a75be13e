"""The pictures of the data benchmarks: JPEGs of the size and weight of web pictures, made from a seed.

Mean about 184 thousand pixels and 80 KB at quality 95, 4:2:0; shorter sides 256 (40 %), 384 (30 %) and 512 (30 %): the
mix that the targets in docs/benchmarks/data.md refer to. Grain on smooth shapes gives the entropy of a photograph.
"""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

SHORT_SIDES = ((0.4, 256), (0.3, 384), (0.3, 512))
GRAIN = 5.5


def jpeg(number: int) -> bytes:
    """Return picture `number`."""
    rng = np.random.default_rng(number)
    short = int(rng.choice([side for _, side in SHORT_SIDES], p=[share for share, _ in SHORT_SIDES]))
    long = int(short * rng.uniform(1.0, 1.5))
    height, width = (short, long) if rng.random() < 0.5 else (long, short)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / short
    image = np.empty((height, width, 3), dtype=np.float32)
    for channel in range(3):
        waves = sum(np.sin(rng.uniform(-12, 12) * x + rng.uniform(-12, 12) * y + rng.uniform(0, 6)) for _ in range(4))
        image[..., channel] = 128 + 28 * waves
    image += rng.normal(0, GRAIN, (height, width, 1)) + rng.normal(0, GRAIN / 2, (height, width, 3))
    buffer = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=95, subsampling="4:2:0")
    return buffer.getvalue()


def samples(num_samples: int) -> Iterator[tuple[str, bytes, str]]:
    """Yield (key, JPEG, caption)."""
    for number in range(num_samples):
        yield f"{number:08d}", jpeg(number), f"picture number {number} of waves and grain"


def write_shards(folder: Path, num_samples: int, samples_per_shard: int) -> list[Path]:
    """Write plain WebDataset shards with jpg, txt and json members."""
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    tar = None
    for number, (key, image, caption) in enumerate(samples(num_samples)):
        if number % samples_per_shard == 0:
            if tar is not None:
                tar.close()
            paths.append(folder / f"{number // samples_per_shard:05d}.tar")
            tar = tarfile.open(paths[-1], "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 - one per shard
        assert tar is not None
        document = json.dumps({"caption": caption, "key": key}).encode()
        for extension, data in (("jpg", image), ("txt", caption.encode()), ("json", document)):
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    if tar is not None:
        tar.close()
    return paths
