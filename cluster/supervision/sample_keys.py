"""The samples of a step: the order is a pure function, so the driver can compute them without any worker."""

import logging

from isthmus.cluster.config import JobConfig
from isthmus.data_pipeline.dataset.load_plan import load_plan
from isthmus.data_pipeline.dataset.shard_index import ShardIndex
from isthmus.data_pipeline.order.plan import Plan
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.trainer.config.schema import StageName

logger = logging.getLogger(__name__)

MAX_KEYS = 4096


def plan_of(config: JobConfig, store: ObjectStore, stage: StageName) -> Plan:
    """Return the order of a stage's samples.

    Raises:
        DataError: a manifest, or an index that data.exclude needs, cannot be read.
    """
    of_stage = config.stage(stage)
    return load_plan(
        config.data,
        store,
        seed=config.run.seed,
        global_batch_size=of_stage.global_batch_size,
        skip_steps=of_stage.skip_steps,
    )


def sample_keys(config: JobConfig, store: ObjectStore, stage: StageName, step: int) -> list[str]:
    """Return the keys `source/shard#key` of a step's global batch in row order, at most some thousands.

    Raises:
        DataError: a manifest or an index cannot be read.
    """
    plan = plan_of(config, store, stage)
    indexes: dict[tuple[int, int], ShardIndex] = {}
    keys: list[str] = []
    for sample in (sample for lane in range(config.data.lanes) for sample in plan.lane_samples(step, lane)):
        if len(keys) == MAX_KEYS:
            logger.warning("step %d has more samples; the first %d are named", step, MAX_KEYS)
            break
        place = (sample.source, sample.shard)
        if place not in indexes:
            indexes[place] = ShardIndex.load(plan.manifests[sample.source].shards[sample.shard], store)
        index = indexes[place]
        number = index.first_sample(sample.chunk) + sample.sample
        keys.append(f"{sample.source}/{sample.shard}#{index.key(number)}")
    return keys
