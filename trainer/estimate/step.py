"""One stage of a run on given hardware: memory, step time as a roofline, days, and what it asks of storage and CPUs."""

import math
from dataclasses import dataclass

from trainer.config import Stage2Config, StageName, TrainConfig
from trainer.errors import ConfigError
from trainer.estimate.flops import Text, Work, feature_pass_flops, stage1_work, stage2_work
from trainer.estimate.hardware import Assumptions, Gpu
from trainer.estimate.memory import (
    FP32,
    HALF,
    Memory,
    gathered_working_set,
    stage1_activations,
    stage2_activations,
    trainable_parameters,
)
from trainer.estimate.shapes import LanguageShape, VisionShape

SECONDS_PER_DAY = 86400.0


@dataclass(frozen=True)
class Cluster:
    """The hardware of an estimate."""

    gpu: Gpu
    num_gpus: int
    gpus_per_node: int = 8

    @property
    def num_nodes(self) -> int:
        """Nodes, the last one perhaps not full."""
        return -(-self.num_gpus // self.gpus_per_node)

    def link_bandwidth(self, assumptions: Assumptions) -> float:
        """Bytes per second that a ring over all GPUs reaches: the slowest link on it."""
        peer = self.gpu.peer_bandwidth
        slowest = peer if self.num_nodes == 1 else min(peer, assumptions.network_bandwidth)
        return slowest * assumptions.network_efficiency


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank receives per step."""

    gathers: float
    gradients: float
    negatives: float

    @property
    def total(self) -> float:
        """All kinds."""
        return self.gathers + self.gradients + self.negatives


@dataclass(frozen=True)
class StageEstimate:
    """What one stage needs and how long it takes."""

    stage: StageName
    work: Work
    memory: Memory
    memory_checkpointed: Memory
    micro_batch: int
    largest_micro_batch: int
    traffic: Traffic
    seconds: dict[str, float]
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

    @property
    def bottleneck(self) -> str:
        """The largest share of the step."""
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
        ConfigError: the global batch is not divisible by the number of GPUs, or not even one sample fits.
    """
    chosen = config.stage(stage)
    if chosen.global_batch_size % cluster.num_gpus:
        raise ConfigError(
            f"{stage}.global_batch_size: {chosen.global_batch_size} is not divisible by {cluster.num_gpus} GPUs; "
            "change either"
        )
    local = chosen.global_batch_size // cluster.num_gpus
    text = Text(real=assumptions.real_text_tokens)
    per_sample = _activations(config, stage, parts, text, checkpointed=False)
    fixed = _fixed_memory(config, stage, parts, cluster, assumptions)
    room = cluster.gpu.memory_bytes * (1 - assumptions.fragmentation) - fixed.total
    largest = max(0, min(local, math.floor(room / per_sample)))
    micro = min(chosen.micro_batch_size, local)
    work = _work(config, stage, parts, text)
    if micro < local and stage == "stage1":
        extra = feature_pass_flops(config.model.qformer, parts.vision, text)
        work = Work(work.vision, work.qformer + extra, work.language)
    traffic = _traffic(config, stage, parts, cluster, local, -(-local // micro))
    seconds = _seconds(work, traffic, local, cluster, assumptions)
    compute = sum(seconds[part] for part in ("vision", "qformer", "language"))
    step = compute + max(0.0, seconds["network"] - assumptions.overlap * compute)
    samples = chosen.steps * chosen.global_batch_size
    return StageEstimate(
        stage=stage,
        work=work,
        memory=_with_activations(fixed, per_sample * micro),
        memory_checkpointed=_with_activations(
            fixed, micro * _activations(config, stage, parts, text, checkpointed=True)
        ),
        micro_batch=micro,
        largest_micro_batch=largest,
        traffic=traffic,
        seconds=seconds,
        step_seconds=step,
        samples_per_second=chosen.global_batch_size / step,
        mfu=work.total * local / step / cluster.gpu.peak_flops,
        days=chosen.steps * step / SECONDS_PER_DAY,
        gpu_hours=chosen.steps * step * cluster.num_gpus / 3600,
        reader_cores=chosen.global_batch_size / step * assumptions.reader_cpu_seconds,
        storage_bytes=samples * assumptions.sample_bytes,
        storage_requests=samples * assumptions.sample_bytes / assumptions.chunk_bytes,
        checkpoint_interval_seconds=math.sqrt(
            2 * assumptions.mean_hours_between_failures * 3600 * assumptions.save_stall_seconds
        ),
        recommendation=_recommendation(stage, parts, cluster, largest, micro),
    )


def _work(config: TrainConfig, stage: StageName, parts: Parts, text: Text) -> Work:
    if stage == "stage1":
        return stage1_work(config.model.qformer, parts.vision, text, original=False)
    assert parts.language is not None
    return stage2_work(config.model.qformer, parts.vision, parts.language, text, original=False)


def _activations(config: TrainConfig, stage: StageName, parts: Parts, text: Text, *, checkpointed: bool) -> float:
    q = config.model.qformer
    if stage == "stage1":
        whole = stage1_activations(q, parts.vision, text, original=False)
        return whole / q.num_layers * 2 if checkpointed else whole
    assert parts.language is not None
    return stage2_activations(q, parts.vision, parts.language, text, original=False, checkpointed=checkpointed)


def _num_trainable(config: TrainConfig, stage: StageName, parts: Parts) -> int:
    q = config.model.qformer
    count = trainable_parameters(q, parts.vision.width, stage2=stage == "stage2")
    if stage == "stage2" and parts.language is not None:
        count += (q.hidden_size + 1) * parts.language.width
    return count


def _fixed_memory(
    config: TrainConfig, stage: StageName, parts: Parts, cluster: Cluster, assumptions: Assumptions
) -> Memory:
    """Everything but activations: trainable part in half precision, fp32 master and moments partitioned (ZeRO)."""
    trainable = _num_trainable(config, stage, parts)
    language = parts.language if isinstance(config.stage(stage), Stage2Config) else None
    frozen_language = HALF * language.num_parameters / cluster.num_gpus if language else 0.0
    return Memory(
        frozen_partition=HALF * parts.vision.num_parameters + frozen_language,
        gathered=gathered_working_set(language) if language else 0.0,
        trainable=HALF * trainable,
        gradients=HALF * trainable,
        optimizer=3 * FP32 * trainable / cluster.num_gpus,
        activations=0.0,
        buffers=HALF * min(trainable, 5e8),
        context=assumptions.cuda_context_bytes,
    )


def _with_activations(fixed: Memory, activations: float) -> Memory:
    return Memory(**{**vars(fixed), "activations": activations})


def _traffic(
    config: TrainConfig, stage: StageName, parts: Parts, cluster: Cluster, local: int, micro_batches: int
) -> Traffic:
    """Bytes received per rank: ZeRO-3 gathers each frozen weight in forward and in backward of every micro-batch."""
    share = (cluster.num_gpus - 1) / cluster.num_gpus
    gradients = 2 * share * HALF * _num_trainable(config, stage, parts)
    if stage == "stage1":
        features = parts.vision.num_tokens * parts.vision.width * HALF
        return Traffic(0.0, gradients, share * local * features)
    assert parts.language is not None
    gathers = 2 * micro_batches * share * HALF * parts.language.num_parameters
    return Traffic(gathers, gradients, 0.0)


def _seconds(work: Work, traffic: Traffic, local: int, cluster: Cluster, assumptions: Assumptions) -> dict[str, float]:
    peak = cluster.gpu.peak_flops
    return {
        "vision": work.vision * local / (peak * assumptions.vision_efficiency),
        "qformer": work.qformer * local / (peak * assumptions.trainable_efficiency),
        "language": work.language * local / (peak * assumptions.language_efficiency),
        "network": traffic.total / cluster.link_bandwidth(assumptions) if cluster.num_gpus > 1 else 0.0,
    }


def _recommendation(stage: StageName, parts: Parts, cluster: Cluster, largest: int, micro: int) -> str:
    """Return one sentence on what to set."""
    if largest < 1:
        return "does not fit: use more GPUs, activation checkpointing, or CPU offload of the frozen partition"
    advice = []
    if micro > largest:
        advice.append(f"set {stage}.micro_batch_size to at most {largest}")
    if stage == "stage2" and parts.language is not None:
        whole = HALF * parts.language.num_parameters
        if cluster.num_gpus == 1:
            advice.append("one GPU holds the whole language model: ZeRO-3 saves nothing here")
        elif cluster.num_nodes > 1 and whole / cluster.gpus_per_node < 0.3 * cluster.gpu.memory_bytes:
            advice.append("ZeRO-3 with hpZ: each node can hold the frozen model once, so gathers stay inside it")
        else:
            advice.append("ZeRO-3 over all ranks")
    else:
        advice.append("ZeRO-1")
    return "; ".join(advice)
