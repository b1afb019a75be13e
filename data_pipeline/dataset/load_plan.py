"""The order of a run from its configuration: manifests, excluded samples, skipped steps."""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from isthmus.data_pipeline.config import DataConfig
from isthmus.data_pipeline.dataset.keys import find_keys, read_keys
from isthmus.data_pipeline.dataset.manifest import Manifest
from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.order.plan import Plan
from isthmus.data_pipeline.order.skipped_steps import SkippedSteps
from isthmus.data_pipeline.store.object_store import ObjectStore

logger = logging.getLogger(__name__)

Excluded = Mapping[int, NDArray[np.int64]]
"""Numbers of the samples of each source that are left out, counted over all chunks of the source."""
_NAMED = 3


def load_plan(
    config: DataConfig,
    store: ObjectStore,
    *,
    seed: int,
    global_batch_size: int,
    skip_steps: Sequence[tuple[int, int]] = (),
    excluded: Excluded | None = None,
) -> Plan:
    """Load the manifests and make the plan.

    Args:
        config: Sources, lanes, shuffling, exclusion.
        store: Access to manifests and indexes.
        seed: Seed of the run.
        global_batch_size: Samples per step.
        skip_steps: Ranges of data steps that training skips.
        excluded: What `excluded_samples` returned to another process; None if it is called here.

    Raises:
        DataError: a manifest or the file of excluded keys is missing or unusable, or sizes do not divide.
    """
    return Plan(
        [(Manifest.load(source.manifest, store), source.weight) for source in config.sources],
        seed=seed,
        global_batch_size=global_batch_size,
        lanes=config.lanes,
        shuffle_chunks=config.shuffle_chunks,
        excluded=excluded_samples(config, store) if excluded is None else excluded,
        skipped=SkippedSteps(skip_steps),
    )


def excluded_samples(config: DataConfig, store: ObjectStore) -> Excluded:
    """Return which samples `data.exclude` names.

    Raises:
        DataError: the file or a manifest cannot be read, or a key `source/shard#key` names no sample.
    """
    if config.exclude is None:
        return {}
    manifests = [Manifest.load(source.manifest, store) for source in config.sources]
    found = find_keys(read_keys(config.exclude, store), manifests, store)
    unknown = [key for key, samples in found.items() if not samples]
    if unknown:
        named = ", ".join(repr(key) for key in unknown[:_NAMED])
        raise DataError(
            f"{config.exclude}: {len(unknown)} of {len(found)} keys are in no source of the run: {named}; "
            "remove these lines, or check the order of data.sources"
        )
    samples = [sample for several in found.values() for sample in several]
    logger.info("%s: %d samples are excluded", config.exclude, len(set(samples)))
    return {
        source: np.unique(np.array([sample.number for sample in samples if sample.source == source], dtype=np.int64))
        for source in range(len(manifests))
    }
