"""One peer, measured in its own process: webdataset or MosaicML streaming with the usual Pillow recipe.

Run by data_throughput.py; prints one JSON object. The recipe is what their users write: decode,
RandomResizedCrop(0.5, 1), bicubic resize, mirror half, and, unless --uint8, scale and normalise to float32.
"""

import argparse
import functools
import importlib.machinery
import io
import json
import math
import os
import random
import sys
import tarfile
import time
import types
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image

SIZE = 224
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


def transform(data: bytes, *, uint8: bool) -> torch.Tensor:
    """Decode and augment one JPEG with Pillow."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(0.5, 1.0)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            break
    else:
        left, top, w, h = 0, 0, width, height
    image = image.crop((left, top, left + w, top + h)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.array(image)
    if uint8:
        return torch.from_numpy(pixels)
    return torch.from_numpy(((pixels.astype(np.float32) / 255 - MEAN) / STD).transpose(2, 0, 1).copy())


def webdataset_batches(urls: list[str], batch: int, decode: Callable[[bytes], torch.Tensor]) -> Iterable[Any]:
    """The usual webdataset pipeline."""
    import webdataset

    return (
        webdataset.WebDataset(urls, shardshuffle=False)
        .shuffle(1000)
        .to_tuple("jpg", "txt")
        .map_tuple(decode, lambda text: text.decode())
        .batched(batch)
    )


def import_streaming() -> Any:
    """Import streaming without torchvision, which its vision classes want and nothing here uses."""
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__dict__.update(VisionDataset=object, to_tensor=None)
        sys.modules[name] = module
    import streaming

    return streaming


def streaming_batches(folder: str, batch: int, decode: Callable[[bytes], torch.Tensor]) -> Iterable[Any]:
    """The usual MosaicML streaming pipeline over its own format."""
    from torch.utils.data import DataLoader

    streaming = import_streaming()

    class Pictures(streaming.StreamingDataset):  # type: ignore[misc, name-defined]
        def __getitem__(self, at: int) -> Any:
            sample = super().__getitem__(at)
            return decode(sample["jpg"]), sample["txt"]

    return DataLoader(Pictures(local=folder, shuffle=True, batch_size=batch), batch_size=batch, num_workers=0)


def write_streaming(tars: list[str], folder: str) -> None:
    """Convert tar shards to MosaicML's format."""
    columns = {"jpg": "bytes", "txt": "str"}
    with import_streaming().MDSWriter(out=folder, columns=columns, compression=None) as out:
        for path in tars:
            with tarfile.open(path) as tar:
                members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
            for name in (name for name in members if name.endswith(".jpg")):
                out.write({"jpg": members[name], "txt": members[f"{name[:-4]}.txt"].decode()})


def measure(batches: Iterable[Any], batch: int, num_samples: int) -> dict[str, float]:
    """Take `num_samples` samples after the first batch; CPU seconds include ended children (curl)."""
    iterator = iter(batches)
    next(iterator)
    before, wall = os.times(), time.perf_counter()
    taken = 0
    for _ in iterator:
        taken += batch
        if taken >= num_samples:
            break
    after = os.times()
    cpu = sum(after[:4]) - sum(before[:4])
    return {"cpu_ms": 1000 * cpu / taken, "wall_ms": 1000 * (time.perf_counter() - wall) / taken, "samples": taken}


def main() -> None:
    """Measure one peer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=["webdataset", "streaming", "convert"])
    parser.add_argument("urls", nargs="+", help="tar URLs; for streaming its folder; for convert tars, then the folder")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--uint8", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    decode = functools.partial(transform, uint8=options.uint8)
    if options.peer == "convert":
        write_streaming(options.urls[:-1], options.urls[-1])
        return
    batches = (
        webdataset_batches(options.urls, options.batch, decode)
        if options.peer == "webdataset"
        else streaming_batches(options.urls[0], options.batch, decode)
    )
    print(json.dumps(measure(batches, options.batch, options.samples)))


if __name__ == "__main__":
    main()
