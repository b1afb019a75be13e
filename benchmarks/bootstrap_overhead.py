"""What captioning on Ray Data costs beside the model: reading, decoding, resizing, writing, Ray itself, in CPU seconds.

    OMP_NUM_THREADS=1 python -m benchmarks.bootstrap_overhead [--images 64] [--actors 2]

The captioner has the size of BLIP-base (random weights) and the pictures that of COCO's. Once every actor has finished
a shard, the work on shards in the actors is counted, and all that the driver and Ray's processes use meanwhile.
"""

import argparse
import io
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import ray
import torch
from PIL import Image
from tokenizers import Tokenizer, models
from transformers import BlipConfig, BlipForConditionalGeneration, PreTrainedTokenizerFast

from isthmus.bootstrap.caption import caption_work
from isthmus.bootstrap.config import CaptionConfig
from isthmus.bootstrap.ray_pool import run_in_actors
from isthmus.bootstrap.stage import Pool, ShardDone, ShardTask, ShardWork, run_stage
from isthmus.data_pipeline.dataset.index_build import IndexOptions, build_manifest
from isthmus.data_pipeline.dataset.manifest import Manifest
from isthmus.data_pipeline.process_pool import run_in_processes
from isthmus.data_pipeline.store.object_store import ObjectStore
from tests.corpus import write_tar

WIDTH, HEIGHT, SIDE_PIXELS, SHARDS = 640, 480, 224, 8


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--actors", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bootstrap-overhead-") as place:
        folder = Path(place)
        write_captioner(folder / "blip")
        manifest = write_pictures(folder, options.images)
        ray.init(address="local", num_cpus=options.actors, include_dashboard=False, log_to_driver=False)
        try:
            measure(folder, manifest, options.actors)
        finally:
            ray.shutdown()


def measure(folder: Path, manifest: str, actors: int) -> None:
    """Caption and print what the model and everything else used after every actor's first shard."""
    store = ObjectStore()
    loaded = Manifest.load(manifest, store)
    config = CaptionConfig(model=str(folder / "blip"), num_candidates=3, max_new_tokens=12, batch_size=8)
    work = caption_work(loaded, str(folder / "out"), config, store)
    run = run_in_actors((actors, actors))
    pool = Pool(lambda one, tasks: run(Measured(one, folder / "times"), tasks))
    others = [others_cpu()]
    run_stage(work, loaded, str(folder / "out"), store, pool, lambda _: others.append(others_cpu()))
    paths = sorted((folder / "times").iterdir(), key=lambda path: path.stat().st_mtime)
    times = [json.loads(path.read_text()) for path in paths][actors:]
    model, actor = (sum(each[i] for each in times) for i in (0, 1))
    began, ended = others[1 + actors], others[-1]
    used = {name: ended.cpu[name] - began.cpu.get(name, 0.0) for name in ended.cpu}
    system = sum(used.values())
    print(f"{loaded.num_samples} images, {actors} actors; after the first {actors} of {SHARDS} shards", end=" ")
    print(f"{ended.seconds - began.seconds:.0f} s, in CPU seconds: model {model:.1f}; beside it", end=" ")
    print(f"in the actors {actor - model:.2f}, Ray and driver {system:.2f}: {(actor - model + system) / model:.1%}")
    print(", ".join(f"{name} {seconds:.2f}" for name, seconds in used.items() if seconds > 0))
    print(f"Ray and driver until then: {sum(began.cpu.values()) - sum(others[0].cpu.values()):.2f}")


@dataclass(frozen=True)
class Measured:
    """Work that notes its CPU time, and of that the model's."""

    work: ShardWork
    folder: Path

    def __call__(self, task: ShardTask) -> ShardDone:
        """Do the work."""
        from isthmus.bootstrap.models import load_writer

        load_writer(self.work.config.model, self.work.store.config)
        began = time.process_time()
        done = self.work(task)
        self.folder.mkdir(exist_ok=True)
        used = [done.model_cpu_seconds, time.process_time() - began]
        (self.folder / f"{task.number}.json").write_text(json.dumps(used))
        return done


@dataclass(frozen=True)
class Others:
    """What this process and those of Ray have used so far, except the captioning actors."""

    seconds: float
    """Wall time."""
    cpu: dict[str, float]
    """CPU seconds by the name of the process."""


def others_cpu() -> Others:
    """Return what everything but the captioning actors has used: all of Ray's processes come from this one."""
    me, cpu = psutil.Process(), dict[str, float]()
    for one in [me, *me.children(recursive=True)]:
        name = "driver" if one == me else process_name(one.cmdline())
        if "MapWorker" not in name:
            cpu[name] = cpu.get(name, 0.0) + sum(one.cpu_times()[:2])
    return Others(time.monotonic(), cpu)


def process_name(command: list[str]) -> str:
    """Return what tells Ray's processes apart: an actor's class, or the file that runs."""
    script = next((part for part in command if part.endswith(".py")), command[0] if command else "")
    return Path(script.split()[0]).name if script else ""


def write_captioner(folder: Path) -> None:
    """Write BLIP-base for small images with random weights, and a tokenizer of its vocabulary."""
    config = BlipConfig(vision_config={"image_size": SIDE_PIXELS})
    BlipForConditionalGeneration(config).eval().save_pretrained(folder)
    words = {"[UNK]": 0, "[PAD]": 1} | {f"w{i}": i for i in range(2, config.text_config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    constants = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(constants))


def write_pictures(folder: Path, count: int) -> str:
    """Write JPEG files of noise over gradients, about 80 kB each, and index them."""
    rng, paths = np.random.default_rng(0), []
    for shard in range(SHARDS):
        members = []
        for number in range(shard * count // SHARDS, (shard + 1) * count // SHARDS):
            file = io.BytesIO()
            coarse = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize((WIDTH, HEIGHT))
            coarse.save(file, "JPEG", quality=92)
            members += [(f"{number:05d}.jpg", file.getvalue()), (f"{number:05d}.txt", b"a picture of the web")]
        paths.append(str(write_tar(folder / "shards" / f"{shard:05d}.tar", members)))
    build_manifest(paths, str(folder / "manifest"), ObjectStore(), IndexOptions(1 << 20), run_in_processes(1))
    return str(folder / "manifest")


if __name__ == "__main__":
    main()
