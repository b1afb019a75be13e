"""Which checkpoints are kept, and which files of crashed saves are deleted."""

import logging
from collections.abc import Callable, Collection

from isthmus.data_pipeline.store.object_store import ObjectInfo, ObjectStore, join
from isthmus.trainer.checkpoint.format import MANIFEST
from isthmus.trainer.checkpoint.reader import IN_USE, SavedCheckpoint, list_checkpoints, list_step_dirs
from isthmus.trainer.config.schema import CheckpointConfig
from isthmus.trainer.errors import CheckpointError

logger = logging.getLogger(__name__)


def kept_steps(metrics_by_step: dict[int, dict[str, float]], config: CheckpointConfig) -> set[int]:
    """Return the steps that the configuration keeps: the last few, every so many steps, the best by a metric."""
    steps = sorted(metrics_by_step)
    kept = set(steps[-config.keep_last :])
    if config.keep_every_steps:
        kept |= {step for step in steps if step % config.keep_every_steps == 0}
    best = best_step(metrics_by_step, config.keep_best)
    return kept if best is None else kept | {best}


def best_step(metrics_by_step: dict[int, dict[str, float]], metric: str | None) -> int | None:
    """Return the step with the best value of a metric, the earliest of equals; None if no step has it."""
    if metric is None:
        return None
    sign = -1.0 if metric.endswith("loss") else 1.0
    values = {step: sign * found[metric] for step, found in metrics_by_step.items() if metric in found}
    return max(values, key=lambda step: (values[step], -step)) if values else None


def prune(
    folder_url: str,
    store: ObjectStore,
    config: CheckpointConfig,
    *,
    protected: Collection[int] = (),
    dry_run: bool = False,
    assert_owner: Callable[[], None] = lambda: None,
) -> tuple[list[int], list[str]]:
    """Delete checkpoints that are neither kept nor in use, and leftovers older than the newest committed one.

    A folder of a later step may be a save in progress, so it is never touched; steps in `protected` are kept as well.
    Returns the deleted steps and leftovers, or with `dry_run` those that would be deleted.

    `assert_owner` is called between listing and deleting: while the run is still ours then, no later owner has written
    anything that was listed. A writer that lost the run without noticing must not collect its successor's uploads.
    """
    found = {checkpoint.step: checkpoint for checkpoint in list_checkpoints(folder_url, store)}
    if not found:
        return [], []
    folders = list_step_dirs(folder_url, store)
    newest = max(found)
    saved = {step: checkpoint for step, checkpoint in found.items() if step == newest or _is_whole(checkpoint, folders)}
    kept = kept_steps({step: checkpoint.state.metrics for step, checkpoint in saved.items()}, config) | set(protected)
    unwanted, leftovers = _unwanted(folders, newest, saved, kept)
    if not dry_run and (unwanted or leftovers):
        assert_owner()
        for urls in (*unwanted.values(), leftovers):
            delete_checkpoint(urls, store)
    if leftovers or unwanted:
        logger.info("%s: deleted checkpoints %s and %d leftovers", folder_url, [*unwanted] or "none", len(leftovers))
    for checkpoint in found.values():
        checkpoint.close()
    return [*unwanted], leftovers


def _unwanted(
    folders: dict[int, list[ObjectInfo]], newest: int, saved: dict[int, SavedCheckpoint], kept: set[int]
) -> tuple[dict[int, list[str]], list[str]]:
    """Return the files of each saved checkpoint that is not kept, and leftovers."""
    unwanted, leftovers = {}, []
    for step, files in folders.items():
        urls = [info.url for info in files]
        if step > newest or any(f"/{IN_USE}/" in url for url in urls):
            continue
        if step not in saved:
            leftovers += urls
        elif step in kept:
            leftovers += _leftovers(urls, saved[step])
        else:
            unwanted[step] = urls
    return unwanted, leftovers


def delete_after(folder_url: str, store: ObjectStore, step: int, *, dry_run: bool = False) -> list[int]:
    """Delete all checkpoints after a step, the newest first.

    Returns their steps, or with `dry_run` those that would be deleted.

    Raises:
        CheckpointError: one of them is being read; nothing is deleted then.
    """
    found = {later: [info.url for info in files] for later, files in list_step_dirs(folder_url, store).items()}
    steps = sorted((later for later in found if later > step), reverse=True)
    if used := [later for later in steps if any(f"/{IN_USE}/" in url for url in found[later])]:
        raise CheckpointError(f"{folder_url}: the checkpoints of steps {used} are being read; try again later")
    for later in steps if not dry_run else ():
        delete_checkpoint(found[later], store)
    return steps


def delete_checkpoint(urls: list[str], store: ObjectStore) -> None:
    """Delete a checkpoint's files, the manifest first: one that is half deleted no longer counts."""
    for url in sorted(urls, key=lambda url: not url.endswith(f"/{MANIFEST}")):
        store.delete(url)


def _is_whole(saved: SavedCheckpoint, folders: dict[int, list[ObjectInfo]]) -> bool:
    """Return whether all files are there: a manifest whose put arrives late may follow the deletion of its files."""
    names = {info.url for info in folders.get(saved.step, ())}
    return all(join(saved.url, entry.name) in names for entry in saved.manifest.files)


def _leftovers(urls: list[str], saved: SavedCheckpoint) -> list[str]:
    known = {join(saved.url, entry.name) for entry in saved.manifest.files} | {join(saved.url, MANIFEST)}
    return [url for url in urls if url not in known]
