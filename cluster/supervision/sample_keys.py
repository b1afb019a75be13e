"""Which samples a step trains on: the order is a pure function, so the driver can tell with every worker dead."""

import logging

from isthmus.cluster.config import JobConfig
from isthmus.data_pipeline.dataset.manifest import Manifest
from isthmus.data_pipeline.dataset.shard_index import ShardIndex
from isthmus.data_pipeline.order.plan import Plan
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.trainer.config.schema import StageName

logger = logging.getLogger(__name__)

MAX_KEYS = 4096


def sample_keys(config: JobConfig, store: ObjectStore, stage: StageName, step: int) -> list[str]:
    """Return the keys `source/shard#key` of a step's global batch in row order, at most some thousands.

    Raises:
        DataError: a manifest or an index cannot be read.
    """
    sources = [(Manifest.load(source.manifest, store), source.weight) for source in config.data.sources]
    plan = Plan(
        sources,
        seed=config.run.seed,
        global_batch_size=config.stage(stage).global_batch_size,
        lanes=config.data.lanes,
        shuffle_chunks=config.data.shuffle_chunks,
    )
    indexes: dict[tuple[int, int], ShardIndex] = {}
    keys: list[str] = []
    for sample in (sample for lane in range(config.data.lanes) for sample in plan.lane_samples(step, lane)):
        if len(keys) == MAX_KEYS:
            logger.warning("step %d has more samples; the first %d are named", step, MAX_KEYS)
            break
        place = (sample.source, sample.shard)
        if place not in indexes:
            indexes[place] = ShardIndex.load(sources[sample.source][0].shards[sample.shard], store)
        index = indexes[place]
        number = index.first_sample(sample.chunk) + sample.sample
        keys.append(f"{sample.source}/{sample.shard}#{index.key(number)}")
    return keys
