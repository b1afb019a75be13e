"""Preflight checks of what a run reads and writes: the run's store, the frozen weights, the data."""

import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from isthmus.cluster.config import JobConfig
from isthmus.data_pipeline.dataset.chosen_captions import check_captions
from isthmus.data_pipeline.dataset.load_plan import excluded_samples
from isthmus.data_pipeline.dataset.manifest import Manifest
from isthmus.data_pipeline.dataset.shard_index import ShardIndex
from isthmus.data_pipeline.errors import AlreadyExistsError, ChangedError, DataError
from isthmus.data_pipeline.store.object_store import NotFoundError, ObjectStore, join

PROBE_BYTES = 16 << 20
MEGA = 1e6
MIN_HEAD_BYTES = 8
"""A safetensors file begins with the length of its header."""


@dataclass(frozen=True)
class StoreSpeed:
    """Throughput of one object written and read."""

    write_megabytes_per_second: float
    read_megabytes_per_second: float


def check_store(config: JobConfig) -> StoreSpeed:
    """Write, read, list, write under conditions and delete under the run's URL, as the run will.

    Raises:
        DataError: something is not permitted, or a write whose condition does not hold is not refused.
    """
    store = ObjectStore(config.store)
    # Not in a folder of their own: on a local disk it would stay.
    prefix = f".preflight-{uuid.uuid4().hex}"
    url, contested = (join(config.run.url, f"{prefix}.{name}") for name in ("probe", "contested"))
    content = os.urandom(PROBE_BYTES)
    try:
        began = time.perf_counter()
        store.put(url, content)
        wrote = time.perf_counter()
        if store.get(url) != content:
            raise DataError(f"{url}: the bytes read back differ from those written; this store cannot be used")
        read = time.perf_counter()
        if [info.url for info in store.list(config.run.url, prefix)] != [url]:
            raise DataError(f"{url}: a written object is not listed; this store cannot be used")
        _check_conditional_writes(store, contested)
    finally:
        store.delete(url)
        store.delete(contested)
    return StoreSpeed(PROBE_BYTES / (wrote - began) / MEGA, PROBE_BYTES / (read - wrote) / MEGA)


def check_weights(config: JobConfig) -> str:
    """Read the head of every weight file of the models that the run reads; return what was found.

    Raises:
        DataError: a model is missing, with the command that brings it; or a folder has no weights, or a file cannot be
            read.
    """
    store = ObjectStore(config.store)
    bridge, language = config.model.qformer, config.model.language
    parts = {"vision": config.model.vision.path, "Q-Former": bridge.init_from, "language": language and language.path}
    folders = {name: folder for name, folder in parts.items() if folder}
    missing = [folder for folder in folders.values() if not _is_there(folder, store)]
    if missing:
        raise DataError(f"{len(missing)} models are missing: {'; '.join(get_command(folder) for folder in missing)}")
    found = []
    for name, folder in folders.items():
        files = [info for info in store.list(folder) if info.url.endswith(".safetensors")]
        if not files:
            raise DataError(f"{folder}: no *.safetensors ({name}); make the folder with isthmus models get")
        for info in files:
            store.get_range(info.url, 0, MIN_HEAD_BYTES, etag=info.etag)
        found.append(f"{name} {sum(info.size for info in files) / 1e9:.2f} GB in {len(files)} files")
    return ", ".join(found)


def _is_there(folder: str, store: ObjectStore) -> bool:
    """Tell whether a folder holds a finished model: `isthmus models get` writes config.json last."""
    try:
        store.head(join(folder, "config.json"))
    except NotFoundError:
        return False
    return True


def check_data(config: JobConfig) -> str:
    """Load every manifest, check its first shard, look up the excluded samples; return what was found.

    Raises:
        DataError: a manifest, its first shard or the shard's index or captions cannot be read, one of them is not the
            one that the manifest names, or `data.exclude` names a sample that there is not.
    """
    store = ObjectStore(config.store)
    found = []
    for source in config.data.sources:
        manifest = Manifest.load(source.manifest, store)
        shard = manifest.shards[0]
        store.get_range(shard.url, 0, MIN_HEAD_BYTES, etag=shard.etag)
        check_captions(shard, ShardIndex.load(shard, store), store)
        found.append(f"{manifest.num_samples} samples in {len(manifest.shards)} shards")
    if config.data.exclude:
        found.append(f"{sum(map(len, excluded_samples(config.data, store).values()))} samples excluded")
    return "; ".join(found)


def _check_conditional_writes(store: ObjectStore, url: str) -> None:
    """Check that the second of two writers is refused under both conditions: lease and commits rest on them."""
    first = store.put_if_absent(url, b"1")
    store.compare_and_swap(url, b"2", first.etag)
    second: dict[str, Callable[[], object]] = {
        "put-if-absent (If-None-Match)": lambda: store.put_if_absent(url, b"3"),
        "compare-and-swap (If-Match)": lambda: store.compare_and_swap(url, b"4", first.etag),
    }
    for name, write in second.items():
        try:
            write()
        except (AlreadyExistsError, ChangedError):
            continue
        raise DataError(f"{url}: a late {name} was not refused; two drivers could write one run on this store")


PUBLISHED = {
    "bert-base-uncased": "google-bert/bert-base-uncased",
    "clip-vit-large-patch14": "openai/clip-vit-large-patch14",
    "eva-clip-vit-g-14": "Salesforce/blip2-itm-vit-g",
    "flan-t5-xl": "google/flan-t5-xl",
    "flan-t5-xxl": "google/flan-t5-xxl",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "opt-2.7b": "facebook/opt-2.7b",
    "opt-6.7b": "facebook/opt-6.7b",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "siglip2-so400m-patch14-224": "google/siglip2-so400m-patch14-224",
}
"""Names on the Hugging Face Hub; EVA-CLIP is published inside BLIP-2."""
PARTS = {"eva-clip-vit-g-14": "vision"}


def get_command(folder_url: str) -> str:
    """Return the command that makes a model's folder."""
    name = folder_url.rstrip("/").rpartition("/")[2]
    part = f" --part {PARTS[name]}" if name in PARTS else ""
    return f"isthmus models get {PUBLISHED.get(name, 'NAME_OR_FOLDER')} {folder_url}{part}"
