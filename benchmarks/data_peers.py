"""One peer, measured in its own process: webdataset or MosaicML streaming with the usual Pillow and torchvision recipe.

Run by data_throughput.py; prints one JSON object. The recipe is what their users write, and what the original BLIP-2
code does: decode with Pillow, then torchvision's RandomResizedCrop(0.5 to 1, bicubic), RandomHorizontalFlip, ToTensor
and Normalize. --uint8 leaves the last two out, as this pipeline does.
"""

import argparse
import functools
import io
import json
import os
import tarfile
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from PIL import Image

# torchvision imports beside a CPU build of torch once these two operators exist; nothing here calls them.
OPERATORS = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    OPERATORS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from torchvision import transforms  # noqa: E402

from benchmarks.data_images import jpeg  # noqa: E402

SIZE = 224
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def make_transform(*, uint8: bool) -> Callable[[bytes], torch.Tensor]:
    """Return a function from an encoded image to its tensor."""
    last = [transforms.PILToTensor()] if uint8 else [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    crop = transforms.RandomResizedCrop(SIZE, scale=(0.5, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
    augment = transforms.Compose([crop, transforms.RandomHorizontalFlip(), *last])
    return functools.partial(_decode, augment=augment)


def _decode(data: bytes, augment: Callable[[Image.Image], torch.Tensor]) -> torch.Tensor:
    return augment(Image.open(io.BytesIO(data)).convert("RGB"))


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


def streaming_batches(folder: str, batch: int, decode: Callable[[bytes], torch.Tensor]) -> Iterable[Any]:
    """The usual MosaicML streaming pipeline over its own format."""
    import streaming
    from torch.utils.data import DataLoader

    class Pictures(streaming.StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: int) -> Any:
            sample = super().__getitem__(at)
            return decode(sample["jpg"]), sample["txt"]

    return DataLoader(Pictures(local=folder, shuffle=True, batch_size=batch), batch_size=batch, num_workers=0)


def write_streaming(tars: list[str], folder: str) -> None:
    """Convert tar shards to MosaicML's format."""
    import streaming

    columns = {"jpg": "bytes", "txt": "str"}
    with streaming.MDSWriter(out=folder, columns=columns, compression=None) as out:
        for path in tars:
            with tarfile.open(path) as tar:
                members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
            for name in (name for name in members if name.endswith(".jpg")):
                out.write({"jpg": members[name], "txt": members[f"{name[:-4]}.txt"].decode()})


def measure(batches: Iterable[Any], batch: int, num_samples: int) -> dict[str, float]:
    """Take `num_samples` samples from the start, reading included; CPU seconds include ended children (curl)."""
    before, wall = os.times(), time.perf_counter()
    taken = 0
    for _ in batches:
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
    if options.peer == "convert":
        write_streaming(options.urls[:-1], options.urls[-1])
        return
    decode = make_transform(uint8=options.uint8)
    decode(jpeg(0))  # what the first call costs is no cost per sample
    batches = (
        webdataset_batches(options.urls, options.batch, decode)
        if options.peer == "webdataset"
        else streaming_batches(options.urls[0], options.batch, decode)
    )
    print(json.dumps(measure(batches, options.batch, options.samples)))


if __name__ == "__main__":
    main()
