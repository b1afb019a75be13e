"""One stage of a run on given hardware: memory, step time as a roofline, days, and the demands on storage and CPUs."""

import math
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from isthmus.trainer.checkpoint.interval import young_daly_seconds
from isthmus.trainer.config.schema import StageName, TrainConfig
from isthmus.trainer.engine.deepspeed_config import frozen_config, trainable_config
from isthmus.trainer.errors import ConfigError
from isthmus.trainer.estimate.flops import Text, Work, feature_pass_flops, foreign_image_flops, stage1_work, stage2_work
from isthmus.trainer.estimate.hardware import Assumptions, Cluster
from isthmus.trainer.estimate.memory import (
    DTYPE_BYTES,
    FP32,
    HALF,
    Kept,
    Memory,
    Stage1Activations,
    gathered_working_set,
    stage1_activations,
    stage2_activations,
    trainable_parameters,
)
from isthmus.trainer.estimate.shapes import LanguageShape, VisionShape
from isthmus.trainer.estimate.traffic import RankStep, Traffic, stage_traffic

SECONDS_PER_DAY = 86400.0
MOMENTS_AND_MASTER = 3

C = TypeVar("C", bound=TrainConfig)


@dataclass(frozen=True)
class StageEstimate:
    """What one stage needs and how long it takes."""

    stage: StageName
    global_batch_size: int
    work: Work
    memory: Memory
    memory_checkpointed: Memory
    micro_batch: int
    largest_micro_batch: int
    traffic: Traffic
    seconds: dict[str, float]
    """Roofline: compute, memory, network, data; each as if it were alone."""
    step_seconds: float
    samples_per_second: float
    mfu: float
    days: float
    gpu_hours: float
    reader_cores: float
    storage_bytes: float
    storage_requests: float
    checkpoint_interval_seconds: float
    recommendation: str
    warnings: tuple[str, ...]
    """What makes the stage slower than estimated."""

    @property
    def bottleneck(self) -> str:
        """The largest part of the roofline."""
        return max(self.seconds, key=lambda part: self.seconds[part])


@dataclass(frozen=True)
class Parts:
    """Shapes of a run's frozen parts."""

    vision: VisionShape
    language: LanguageShape | None


def estimate_stage(
    config: TrainConfig, stage: StageName, parts: Parts, cluster: Cluster, assumptions: Assumptions
) -> StageEstimate:
    """Estimate one stage of a run.

    Raises:
        ConfigError: the global batch is not divisible by the number of GPUs.
    """
    return _Stage(config, stage, parts, cluster, assumptions).estimate()


def divisible(config: C, num_gpus: int) -> C:
    """Return the configuration with global batches rounded down to multiples of `num_gpus`, and as many samples."""
    changed: dict[str, Any] = {}
    for stage in config.stages:
        chosen = config.stage(stage)
        whole = max(num_gpus, chosen.global_batch_size // num_gpus * num_gpus)
        steps = round(chosen.steps * chosen.global_batch_size / whole)
        changed[stage] = chosen.model_copy(update={"global_batch_size": whole, "steps": steps})
    return config.model_copy(update=changed)


class _Stage:
    """What the parts of an estimate share; used once."""

    def __init__(
        self, config: TrainConfig, stage: StageName, parts: Parts, cluster: Cluster, assumptions: Assumptions
    ) -> None:
        chosen = config.stage(stage)
        if chosen.global_batch_size % cluster.num_gpus:
            raise ConfigError(
                f"{stage}.global_batch_size: {chosen.global_batch_size} is not divisible by {cluster.num_gpus} GPUs; "
                "change either"
            )
        self.config, self.stage, self.parts, self.cluster, self.assumptions = config, stage, parts, cluster, assumptions
        self.chosen, self.q = chosen, config.model.qformer
        self.local = chosen.global_batch_size // cluster.num_gpus
        virtual = config.run.virtual_ranks
        self.micro = min(chosen.micro_batch_size, self.local, chosen.global_batch_size // (virtual or 1))
        self.in_tree = config.same_bits == "world_size"
        self.waiting_sums = math.log2(max(1, virtual // cluster.num_gpus)) if virtual and self.in_tree else 0.0
        self.frozen_zero = frozen_config(chosen.deepspeed)["zero_optimization"]
        self.trainable_zero = trainable_config(chosen.deepspeed)["zero_optimization"]
        self.text = Text(real=assumptions.real_text_tokens, longest=assumptions.longest_text_tokens)
        self.kept = Kept.of(chosen.precision, self.q.dropout)
        model = config.model_at(stage)
        self.vision_element = DTYPE_BYTES[model.vision.torch_dtype]
        self.language_element = DTYPE_BYTES[model.language.torch_dtype] if model.language else HALF
        self.trainable = trainable_parameters(self.q, parts.vision.width, stage2=stage == "stage2")
        if self.language is not None:
            self.trainable += (self.q.hidden_size + 1) * self.language.width

    @property
    def language(self) -> LanguageShape | None:
        """The language model, in stage 2."""
        return self.parts.language if self.stage == "stage2" else None

    def estimate(self) -> StageEstimate:
        """Put the parts together."""
        chosen, assumptions, cluster = self.chosen, self.assumptions, self.cluster
        fixed, largest = self.fixed_memory(), self.largest_micro_batch()
        work = self.work()
        traffic = self.traffic()
        seconds = self.roofline(work, traffic)
        device = max(seconds["compute"], seconds["memory"])
        step = max(device + self.exposed_network(traffic, device), seconds["data"])
        samples = chosen.steps * chosen.global_batch_size
        return StageEstimate(
            stage=self.stage,
            global_batch_size=chosen.global_batch_size,
            work=work,
            memory=self.with_activations(fixed, self.micro),
            memory_checkpointed=self.with_activations(fixed, self.micro, checkpointed=True),
            micro_batch=self.micro,
            largest_micro_batch=largest,
            traffic=traffic,
            seconds=seconds,
            step_seconds=step,
            samples_per_second=chosen.global_batch_size / step,
            mfu=work.total * self.local / step / cluster.gpu.peak_flops,
            days=chosen.steps * step / SECONDS_PER_DAY,
            gpu_hours=chosen.steps * step * cluster.num_gpus / 3600,
            reader_cores=chosen.global_batch_size / step * assumptions.reader_cpu_seconds,
            storage_bytes=samples * assumptions.sample_bytes,
            storage_requests=samples * assumptions.sample_bytes / assumptions.chunk_bytes,
            checkpoint_interval_seconds=self.checkpoint_interval_seconds,
            recommendation="; ".join(self.advice(largest, traffic, seconds)),
            warnings=tuple(self.config.slow_frozen_parts(self.stage)),
        )

    def work(self) -> Work:
        """Operations per sample, with what micro-batches repeat."""
        if self.language is not None:
            return stage2_work(self.q, self.parts.vision, self.language, self.text)
        work = stage1_work(self.q, self.parts.vision, self.text, matched=self.config.matched_share)
        foreign = self.outside(self.micro) * foreign_image_flops(self.q, self.parts.vision)
        again = self.chosen.micro_batch_size < self.local
        twice = feature_pass_flops(self.q, self.parts.vision, self.text) if again else 0.0
        return Work(work.vision, work.qformer + foreign + twice)

    def outside(self, micro: int) -> float:
        """Negative images per row that are encoded again: one, unless the micro-batch is the global batch.

        Where rows are drawn for matching, their images are part of that work.
        """
        return float(micro < self.chosen.global_batch_size and self.config.matched_share == 1)

    def drawn(self, micro: int) -> float | None:
        """Rows per sample of a micro-batch whose pairs are run at a time; None means all rows."""
        share = self.config.matched_share
        return min(1.0, math.ceil(share * self.local) / micro) if share < 1 else None

    def activations(self, micro: int, *, checkpointed: bool | None = None) -> float:
        """Bytes per sample of a micro-batch at its peak; `checkpointed` none: as the configuration says."""
        if self.language is None:
            return self.stage1_activations(micro, checkpointed=checkpointed).peak
        return self.stage2_activations(checkpointed=checkpointed)

    def written(self) -> float:
        """Bytes of activations per sample over a whole step."""
        if self.language is None:
            return self.stage1_activations(self.micro).written
        return self.stage2_activations()

    def stage2_activations(self, *, checkpointed: bool | None = None) -> float:
        """What the model leaves per sample."""
        assert self.language is not None
        options = self.config.model.language
        recompute = options is not None and options.activation_checkpointing
        return stage2_activations(
            self.q, self.parts.vision, self.language, self.text, self.kept,
            language_element=self.language_element,
            checkpointed=recompute if checkpointed is None else checkpointed,
        )  # fmt: skip

    def stage1_activations(self, micro: int, *, checkpointed: bool | None = None) -> Stage1Activations:
        """What the model leaves per sample of a micro-batch."""
        recompute = self.q.activation_checkpointing
        return stage1_activations(
            self.q, self.parts.vision, self.text, self.kept,
            outside=self.outside(micro), drawn=self.drawn(micro),
            checkpointed=recompute if checkpointed is None else checkpointed,
        )  # fmt: skip

    def fixed_memory(self) -> Memory:
        """Everything but activations: trainable part in fp32 with its cast, master and moments partitioned (ZeRO)."""
        world, vision = self.cluster.num_gpus, self.parts.vision
        cast = HALF if self.chosen.precision != "fp32" else 0
        features = self.local * vision.num_tokens * vision.width * self.vision_element if self.stage == "stage1" else 0
        partition = 0.0
        if self.language is not None:
            whole = self.language_element * self.language.num_parameters
            partition = whole / world + (whole / min(self.hpz, world) if self.hpz > 1 else 0)
        return Memory(
            frozen_partition=self.vision_element * vision.num_parameters + partition,
            gathered=self.gathered(),
            trainable=(FP32 + cast) * self.trainable,
            gradients=FP32 * self.trainable,
            optimizer=MOMENTS_AND_MASTER * FP32 * self.trainable / world,
            activations=0.0,
            buffers=features,
            context=self.assumptions.cuda_context_bytes,
        )

    def gathered(self) -> float:
        """Bytes of frozen weights that are whole on a GPU at once."""
        if self.language is None or self.cluster.num_gpus == 1:
            return 0.0
        return gathered_working_set(
            self.language, self.language_element, self.reuse_distance,
            float(self.frozen_zero.get("stage3_prefetch_bucket_size", 5e7)),
        )  # fmt: skip

    @property
    def reuse_distance(self) -> float:
        """Parameters within which ZeRO-3 keeps what is needed again."""
        return float(self.frozen_zero.get("stage3_max_reuse_distance", 1e9))

    @property
    def checkpoint_interval_seconds(self) -> float:
        """What the automatic interval of checkpoints comes to."""
        assumed = self.assumptions
        return young_daly_seconds(assumed.save_stall_seconds, assumed.mean_hours_between_failures * 3600)

    @property
    def hpz(self) -> int:
        """Ranks over which a second copy of the frozen model is partitioned; 1: none."""
        return int(self.frozen_zero.get("zero_hpz_partition_size", 1))

    def with_activations(self, fixed: Memory, micro: int, *, checkpointed: bool | None = None) -> Memory:
        """Add the fuller of two moments: before a micro-batch runs backward, and while gradients are reduced.

        The bucket of that reduction is always allocated in full and freed again. A reduction in a tree
        has a flat copy of the gradient and as much that is exchanged; before, sums wait at each level of the tree.
        """
        kept = micro * self.activations(micro, checkpointed=checkpointed) + FP32 * self.trainable * self.waiting_sums
        reduced = 2.0 * self.trainable if self.in_tree else float(self.trainable_zero.get("reduce_bucket_size", 5e8))
        return replace(fixed, activations=max(kept, FP32 * reduced))

    def largest_micro_batch(self) -> int:
        """Return how many samples fit at a time."""
        usable = self.cluster.gpu.memory_bytes * (1 - self.assumptions.fragmentation)
        room = usable - self.fixed_memory().total

        def fits(micro: int) -> bool:
            return micro * self.activations(micro) <= room

        low, high = 0, self.local
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low

    def traffic(self) -> Traffic:
        """Bytes that a rank receives per step."""
        step = RankStep(
            self.trainable, self.cluster.num_gpus, self.local, self.micro, self.vision_element, self.language_element,
            self.reuse_distance, self.config.matched_share, self.in_tree,
        )  # fmt: skip
        return stage_traffic(self.q, self.parts.vision, self.language, step)

    def roofline(self, work: Work, traffic: Traffic) -> dict[str, float]:
        """Seconds per step of each part alone."""
        assumptions, gpu = self.assumptions, self.cluster.gpu
        compute = work.vision / assumptions.vision_efficiency
        compute += work.qformer / assumptions.trainable_efficiency
        compute += work.language / assumptions.language_efficiency
        network = sum(self.network_seconds(traffic, self.hpz))
        stored = self.chosen.global_batch_size * assumptions.sample_bytes / assumptions.storage_bandwidth
        read = self.chosen.global_batch_size * assumptions.reader_cpu_seconds / self.given_reader_cores()
        return {
            "compute": compute * self.local / gpu.peak_flops,
            "memory": self.memory_traffic() / (gpu.memory_bandwidth * assumptions.memory_efficiency),
            "network": network,
            "data": max(stored, read),
        }

    def memory_traffic(self) -> float:
        """Bytes through the GPU's memory: activations written and read, frozen weights, gradients, the optimizer.

        Intermediate results of norms and dropout are as much again as what is kept. AdamW reads gradient, weight and
        moments of the partition and writes three of them; the whole gradient is zeroed and added to.
        """
        micro_batches = -(-self.local // self.micro)
        frozen = self.vision_element * self.parts.vision.num_parameters
        if self.language is not None:
            frozen += 2 * self.language_element * self.language.num_parameters
        optimizer = FP32 * self.trainable * (3 * micro_batches + 7 / self.cluster.num_gpus)
        return 3 * self.local * self.written() + micro_batches * frozen + optimizer

    def network_seconds(self, traffic: Traffic, hpz: int) -> tuple[float, float]:
        """Return seconds of what can hide behind compute (gathers), and of what cannot."""
        link = self.cluster.link_bandwidth(self.assumptions)
        peer = self.cluster.gpu.peer_bandwidth * self.assumptions.network_efficiency
        return traffic.gathers / (peer if hpz > 1 else link), (traffic.total - traffic.gathers) / link

    def exposed_network(self, traffic: Traffic, device: float) -> float:
        """Seconds in which the GPU waits: gradients and negatives move when nothing is left to compute."""
        hidden, bare = self.network_seconds(traffic, self.hpz)
        return bare + max(0.0, hidden - self.assumptions.overlap * device)

    def given_reader_cores(self) -> int:
        """Return CPU cores that read: reader actors in all, or processes of each worker."""
        data = self.config.data
        return max(1, data.readers) if data.backend == "ray" else max(1, data.readers) * self.cluster.num_gpus

    def advice(self, largest: int, traffic: Traffic, seconds: dict[str, float]) -> list[str]:
        """Return what to set: micro-batch, partitioning, readers."""
        if largest < 1:
            return ["does not fit: use more GPUs or larger ones"]
        partitioning = "ZeRO-1" if self.language is None else self.partitioning_advice(traffic)
        save = f"a save every {self.checkpoint_interval_seconds / 60:.0f} min"
        advice = [self.micro_batch_advice(largest), partitioning, save]
        device = max(seconds["compute"], seconds["memory"])
        without_data = device + self.exposed_network(traffic, device)
        if seconds["data"] > without_data:
            needed = math.ceil(self.chosen.global_batch_size / without_data * self.assumptions.reader_cpu_seconds)
            each = 1 if self.config.data.backend == "ray" else self.cluster.num_gpus
            advice.append(f"data holds the GPUs up: data.readers at least {-(-needed // each)}")
        return advice

    def micro_batch_advice(self, largest: int) -> str:
        """One micro-batch per step is best: nothing is computed or gathered twice. Else as few equal ones as fit."""
        if largest >= self.local:
            return f"micro-batch {self.local}, all that a GPU takes in a step"
        return f"micro-batch {-(-self.local // -(-self.local // largest))} (at most {largest} fit)"

    def partitioning_advice(self, traffic: Traffic) -> str:
        """Compare ZeRO-3 over all ranks with a second copy of the frozen model in each node (hpZ)."""
        assert self.language is not None
        cluster = self.cluster
        whole = self.language_element * self.language.num_parameters
        if cluster.num_gpus == 1:
            return "one GPU holds the whole language model: ZeRO-3 saves nothing here"
        flat, within = (self.network_seconds(traffic, hpz)[0] for hpz in (1, cluster.gpus_per_node))
        more = whole / cluster.gpus_per_node
        if cluster.num_nodes == 1 or more > 0.3 * cluster.gpu.memory_bytes or within >= flat:
            return "ZeRO-3 over all ranks"
        return (
            f"ZeRO-3 with hpZ (stage2_zero3_hpz): gathers take {within:.2f} s of a step instead of {flat:.2f} s, "
            f"for {more / 1e9:.1f} GB more per GPU"
        )
