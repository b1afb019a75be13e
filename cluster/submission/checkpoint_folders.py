"""The checkpoints of a run as an operator names them: by the run's folder, or by a stage's checkpoints folder."""

import time
from contextlib import suppress
from dataclasses import dataclass

from isthmus.cluster.errors import ClusterError
from isthmus.cluster.submission.run_folder import stored_config
from isthmus.data_pipeline.store.object_store import ObjectStore, join
from isthmus.trainer.checkpoint.format import MANIFEST, step_of
from isthmus.trainer.checkpoint.reader import SavedCheckpoint, list_checkpoints, list_step_dirs
from isthmus.trainer.checkpoint.retention import best_step
from isthmus.trainer.errors import ConfigError, TrainerError
from isthmus.trainer.runs.store import read_run

KEY_METRICS = ("eval/i2t_r1", "eval/cider_d", "eval/loss")
"""Shown where the run names none (`checkpoint.keep_best`), the first that was measured."""


@dataclass(frozen=True)
class CheckpointEntry:
    """One committed checkpoint in a list."""

    url: str
    stage: str
    step: int
    size_bytes: int
    age_seconds: float | None
    world_size: int
    metrics: dict[str, float]
    versions: dict[str, str]
    key_metric: str | None
    """Name of the metric by which checkpoints of this stage are compared."""
    is_best: bool
    """By the key metric, in its stage."""


def list_entries(run: str, store: ObjectStore) -> list[CheckpointEntry]:
    """Return the committed checkpoints of a run, by stage, newest first.

    Raises:
        ClusterError: there are none.
    """
    return [entry for folder in checkpoint_folders(run, store) for entry in _entries(folder, store)]


def checkpoint_folders(run: str, store: ObjectStore) -> list[str]:
    """Return the checkpoint folders of a run's folder; a checkpoint folder itself is returned as it is.

    Raises:
        ClusterError: there are none.
    """
    root = run.rstrip("/")
    candidates = [root, *(join(root, stage, "checkpoints") for stage in ("stage1", "stage2"))]
    found = [url for url in candidates if list_step_dirs(url, store)]
    if not found:
        raise ClusterError(
            f"{root}: contains no checkpoints; give the folder of a run (isthmus runs ls) or of checkpoints"
        )
    return found


def steps_in_use_by_stage2(folder: str, store: ObjectStore) -> list[int]:
    """Return the steps in a checkpoints folder that stage 2 was initialised from."""
    try:
        records = read_run(_run_of(folder), store).get("handoffs", {}).values()
    except TrainerError:  # a folder of checkpoints outside a run
        return []
    steps = [step_of(record["url"].rpartition("/")[2]) for record in records if record["url"].startswith(folder)]
    return [step for step in steps if step is not None]


def _entries(folder: str, store: ObjectStore) -> list[CheckpointEntry]:
    found = list_checkpoints(folder, store)
    metrics = {saved.step: saved.state.metrics for saved in found}
    key = _key_metric(folder, metrics, store)
    best = best_step(metrics, key)
    return [_entry(saved, key, store, is_best=saved.step == best) for saved in found]


def _entry(saved: SavedCheckpoint, key: str | None, store: ObjectStore, *, is_best: bool) -> CheckpointEntry:
    state, modified = saved.state, store.head(join(saved.url, MANIFEST)).modified_at
    return CheckpointEntry(
        url=saved.url,
        stage=state.stage,
        step=saved.step,
        size_bytes=saved.size_bytes,
        age_seconds=None if modified is None else time.time() - modified,
        world_size=saved.manifest.world_size,
        metrics=state.metrics,
        versions=state.versions,
        key_metric=key,
        is_best=is_best,
    )


def _key_metric(folder: str, metrics: dict[int, dict[str, float]], store: ObjectStore) -> str | None:
    measured: set[str] = set().union(*metrics.values())
    keep_best = None
    with suppress(ClusterError, ConfigError):  # a folder of checkpoints outside a run, or a run of another release
        keep_best = stored_config(_run_of(folder), store).checkpoint.keep_best
    return next((name for name in (keep_best, *KEY_METRICS) if name in measured), None)


def _run_of(folder: str) -> str:
    """Return the run's folder of `<run>/<stage>/checkpoints`."""
    return folder.rsplit("/", 2)[0]
