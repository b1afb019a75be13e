"""The identity of a run's frozen weights, and the check that training does not change them.

The identity of a folder is a tree of sha256 hashes, so that many threads and ranks share the work:

    leaf     = sha256(one block of BLOCK_BYTES bytes of a tensor as stored; the last block may be shorter)
    tensor   = sha256(JSON of [name, type, shape], then its leaves in order)
    identity = sha256(all tensor hashes in order of names)

It does not depend on how the tensors are spread over files, nor on the number of ranks.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from isthmus.data_pipeline.store.object_store import ObjectInfo, ObjectStore
from isthmus.trainer.context import Rank
from isthmus.trainer.errors import TrainerError
from isthmus.trainer.frozen.safetensors_index import TensorEntry, is_direct, read_entries

BLOCK_BYTES = 16 << 20
HASH_THREADS = 4
_DIGEST_BYTES = 32
TEXT_FILES = frozenset({
    "config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model",
})  # fmt: skip
NOT_OF_THE_MODEL = frozenset({"transformers_version", "_name_or_path"})


def frozen_identity(folder_url: str, store: ObjectStore, rank: Rank | None = None) -> str:
    """Return the identity of a folder's tensors, 64 hex digits.

    Args:
        folder_url: Folder with safetensors files, local or in an object store.
        store: Access to it.
        rank: Place of this process when all ranks call together, each to hash its share (collective); None means alone.
    """
    rank = rank or Rank(0, 1)
    entries = [entry for _, entry in sorted(read_entries(folder_url, store).items())]
    blocks = [(entry, start) for entry in entries for start in range(0, entry.num_bytes, BLOCK_BYTES)]
    leaves = np.zeros((len(blocks), _DIGEST_BYTES), np.uint8)
    mine = range(rank.rank, len(blocks), rank.world_size)
    with ThreadPoolExecutor(HASH_THREADS, thread_name_prefix="identity") as pool:
        for i, leaf in zip(mine, pool.map(lambda i: _hash_block(*blocks[i], store), mine), strict=True):
            leaves[i] = np.frombuffer(leaf, np.uint8)
    if rank.world_size > 1:
        leaves = _sum_over_ranks(leaves)
    by_tensor: dict[str, list[bytes]] = {entry.name: [] for entry in entries}
    for (entry, _), row in zip(blocks, leaves, strict=True):
        by_tensor[entry.name].append(row.tobytes())
    return hashlib.sha256(b"".join(_hash_tensor(entry, by_tensor[entry.name]) for entry in entries)).hexdigest()


def text_files(folder_url: str, store: ObjectStore) -> list[ObjectInfo]:
    """Return the files of a folder that say what its model is besides the weights: configuration and tokenizer."""
    found = sorted(store.list(folder_url.rstrip("/") + "/"), key=lambda info: info.url)
    return [info for info in found if _name(info) in TEXT_FILES and is_direct(folder_url, info)]


def text_identity(files: Iterable[ObjectInfo], store: ObjectStore) -> str:
    """Return a hash of the content of `text_files`.

    What a library notes about itself when it saves config.json does not count.
    """
    digest = hashlib.sha256()
    for info in files:
        name = _name(info)
        digest.update(f"{name}\0".encode() + hashlib.sha256(_significant(name, store.get(info.url))).digest())
    return digest.hexdigest()


class FrozenGuard:
    """Holds the hashes of this rank's frozen parameters and all buffers, and shows later that they did not change."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._before = _live_hashes(module)

    def check(self) -> None:
        """Hash again and compare. Collective: all ranks learn of a change on any.

        Raises:
            TrainerError: a frozen parameter or a buffer has changed.
        """
        after = _live_hashes(self._module)
        changed = sorted(
            name for name in self._before.keys() | after.keys() if self._before.get(name) != after.get(name)
        )
        count = torch.tensor([len(changed)])
        if dist.is_initialized():
            dist.all_reduce(count, op=dist.ReduceOp.MAX)
        if count.item():
            raise TrainerError(
                f"frozen weights have changed during training: {', '.join(changed[:5]) or 'on another rank'}; "
                "do not use the checkpoints of this start of the run, and report the stage and its DeepSpeed template"
            )


def _name(info: ObjectInfo) -> str:
    return info.url.rsplit("/", 1)[-1]


def _significant(name: str, data: bytes) -> bytes:
    if name != "config.json":
        return data
    try:
        fields = json.loads(data)
        return json.dumps({key: fields[key] for key in fields.keys() - NOT_OF_THE_MODEL}, sort_keys=True).encode()
    except (ValueError, AttributeError):  # whoever reads it reports that
        return data


def _hash_block(entry: TensorEntry, start: int, store: ObjectStore) -> bytes:
    length = min(BLOCK_BYTES, entry.num_bytes - start)
    return hashlib.sha256(store.get_range(entry.url, entry.start + start, length, etag=entry.etag)).digest()


def _hash_tensor(entry: TensorEntry, leaves: list[bytes]) -> bytes:
    head = json.dumps([entry.name, str(entry.dtype).removeprefix("torch."), entry.shape]).encode()
    return hashlib.sha256(head + b"".join(leaves)).digest()


def _sum_over_ranks(leaves: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Join rows of which each rank has some and zeros elsewhere."""
    dist.all_reduce(torch.from_numpy(leaves))
    return leaves


def _live_hashes(module: nn.Module) -> dict[str, bytes]:
    tensors = dict(_frozen_tensors(module))
    with ThreadPoolExecutor(HASH_THREADS, thread_name_prefix="guard") as pool:
        return dict(zip(tensors, pool.map(_hash_live, tensors.values()), strict=True))


def _frozen_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what this rank holds of each frozen parameter, its ZeRO-3 partition or all of it, and all buffers."""
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            yield name, getattr(parameter, "ds_tensor", parameter).detach()
    yield from module.named_buffers()  # such as the statistics of batch normalisation


def _hash_live(tensor: Tensor) -> bytes:
    return hashlib.sha256(memoryview(tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy().data)).digest()
