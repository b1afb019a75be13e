"""Copying and comparing whole checkpoints."""

from typing import Any

import torch

from isthmus.data_pipeline.store.object_store import AlreadyExistsError, ObjectStore, join
from isthmus.trainer.checkpoint.format import MANIFEST, hash_file
from isthmus.trainer.checkpoint.reader import SavedCheckpoint
from isthmus.trainer.engine.state_shards import KINDS
from isthmus.trainer.errors import CheckpointError


def copy_checkpoint(saved: SavedCheckpoint, target_url: str, store: ObjectStore) -> None:
    """Copy a checkpoint; every file is verified on the way, and the manifest is written last.

    Raises:
        CheckpointError: a file is damaged, or the target holds another checkpoint.
    """
    for entry in saved.manifest.files:
        data = store.get(join(saved.url, entry.name))
        if hash_file(entry.name, [data]) != entry:
            raise CheckpointError(f"{join(saved.url, entry.name)}: is damaged; nothing was committed at {target_url}")
        store.put(join(target_url, entry.name), data)
    url, manifest = join(target_url, MANIFEST), saved.manifest.to_bytes()
    try:
        store.put_if_absent(url, manifest)
    except AlreadyExistsError as error:
        if store.get(url) != manifest:
            raise CheckpointError(f"{url}: holds another checkpoint; choose another target") from error


def differences(one: SavedCheckpoint, two: SavedCheckpoint) -> list[dict[str, Any]]:
    """Return what differs between two checkpoints, tensor by tensor; empty: bit-identical."""
    found: list[dict[str, Any]] = []

    def add(name: str, kind: str, difference: str) -> None:
        found.append({"name": name, "kind": kind, "difference": difference})

    first, second = one.shapes(), two.shapes()
    for name in sorted(first.keys() | second.keys()):
        if first.get(name) != second.get(name):
            add(name, "", f"shape {first.get(name, 'absent')} against {second.get(name, 'absent')}")
            continue
        for kind in KINDS:
            a, b = one.read_tensor(name, kind), two.read_tensor(name, kind)
            unequal = int((a.reshape(-1).view(torch.int32) != b.reshape(-1).view(torch.int32)).sum())
            if unequal:
                largest = float((a - b).abs().max())
                add(name, kind, f"{unequal} of {a.numel()} elements differ, by at most {largest:.3g}")
    for key, value in one.state.as_json().items():
        other = two.state.as_json()[key]
        if value != other:
            add(f"state.{key}", "", f"{value!r} against {other!r}")
    return found
