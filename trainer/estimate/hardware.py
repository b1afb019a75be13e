"""Accelerators from their public data sheets, and the assumptions that turn peak rates into expected rates."""

import re
from dataclasses import dataclass, fields, replace
from typing import Any

from isthmus.trainer.errors import ConfigError

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """Figures of one card by its public data sheet; the one table for estimates and for MFU while training."""

    name: str
    device_name: str
    """Part of the name that CUDA gives the card; the first that matches counts."""
    peak_flops: float
    """Dense bf16 (V100: fp16) operations per second, without sparsity."""
    memory_bytes: float
    memory_bandwidth: float
    """Bytes per second."""
    peer_bandwidth: float
    """Bytes per second to another card of the node, in one direction."""


PCIE4, PCIE5 = 32e9, 64e9
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("gb200", "GB200", 2500e12, 186e9, 8.0e12, 900e9),
        Gpu("b200", "B200", 2250e12, 180e9, 7.7e12, 900e9),
        Gpu("h200", "H200", 989e12, 141e9, 4.8e12, 450e9),
        Gpu("h100-nvl", "H100 NVL", 835e12, 94e9, 3.9e12, 300e9),
        Gpu("h100-pcie", "H100 PCIe", 756e12, 80 * GIB, 2.0e12, PCIE5),
        Gpu("h100", "H100", 989e12, 80 * GIB, 3.35e12, 450e9),
        Gpu("a100-40g", "A100-SXM4-40GB", 312e12, 40 * GIB, 1.555e12, 300e9),
        Gpu("a100-80g", "A100", 312e12, 80 * GIB, 2.039e12, 300e9),
        Gpu("l40s", "L40S", 362e12, 48 * GIB, 0.864e12, PCIE4),
        Gpu("l4", "L4", 121e12, 24 * GIB, 0.3e12, PCIE4),
        Gpu("a10g", "A10G", 70e12, 24 * GIB, 0.6e12, PCIE4),
        Gpu("rtx-a6000", "RTX A6000", 154.8e12, 48 * GIB, 0.768e12, PCIE4),
        Gpu("rtx-4090", "RTX 4090", 165e12, 24 * GIB, 1.008e12, PCIE4),
        Gpu("v100", "V100", 125e12, 32 * GIB, 0.9e12, 150e9),
        Gpu("mi300x", "MI300X", 1307e12, 192 * GIB, 5.3e12, 448e9),
    )
}


def find_gpu(name: str) -> Gpu:
    """Return the card of that name.

    Raises:
        ConfigError: it is not known; lists those that are.
    """
    if name not in GPUS:
        raise ConfigError(f"--gpu {name}: unknown; choose one of {', '.join(GPUS)}")
    return GPUS[name]


def gpu_of_device(device_name: str) -> Gpu | None:
    """Return the card that CUDA names so, such as "NVIDIA H100 80GB HBM3"; none if it is not in the table."""
    return next((gpu for gpu in GPUS.values() if re.search(rf"\b{gpu.device_name}\b", device_name)), None)


@dataclass(frozen=True)
class Assumptions:
    """What an estimate assumes; each figure can be overridden by name."""

    vision_efficiency: float = 0.45
    """Fraction of peak that the frozen encoder reaches: large dense products, no gradient."""
    trainable_efficiency: float = 0.30
    """Fraction of peak of the Q-Former: small products, dropout, optimizer."""
    language_efficiency: float = 0.45
    """Fraction of peak of the frozen language model."""
    network_bandwidth: float = 50e9
    """Bytes per second and node between nodes (400 Gbit/s)."""
    network_efficiency: float = 0.7
    """Fraction of a link's bandwidth that collectives reach."""
    overlap: float = 0.7
    """Fraction of compute behind which ZeRO-3's gathers can hide; gradients and negatives never do."""
    real_text_tokens: float = 12.0
    """Mean caption length in tokens, special tokens included."""
    longest_text_tokens: float = 24.0
    """Longest caption of a micro-batch, to which stage 2 pads."""
    memory_efficiency: float = 0.7
    """Fraction of memory bandwidth that elementwise work and the optimizer reach."""
    storage_bandwidth: float = 10e9
    """Bytes per second from the object store to all readers together."""
    sample_bytes: float = 80e3
    """Mean size of a sample in its shard."""
    reader_cpu_seconds: float = 0.0026
    """CPU seconds to fetch, decode and crop one sample."""
    chunk_bytes: float = 16e6
    """Bytes per object-store request."""
    cuda_context_bytes: float = 1.2e9
    """Memory that a process takes before the first tensor, libraries included."""
    fragmentation: float = 0.05
    """Fraction of memory lost between blocks."""
    mean_hours_between_failures: float = 8.0
    """Of the whole job; sets the checkpoint interval."""
    save_stall_seconds: float = 1.0
    """Training time lost per checkpoint."""


def with_overrides(gpu: Gpu, overrides: dict[str, float]) -> tuple[Gpu, Assumptions]:
    """Return the card and the default assumptions with some of their figures replaced, by name.

    Raises:
        ConfigError: a name is not known.
    """
    of_card = {field.name for field in fields(Gpu)} - {"name", "device_name"}
    known = of_card | {field.name for field in fields(Assumptions)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ConfigError(f"assumption {unknown[0]}: unknown; choose one of {', '.join(sorted(known))}")
    card: dict[str, Any] = {name: value for name, value in overrides.items() if name in of_card}
    rest = {name: value for name, value in overrides.items() if name not in of_card}
    return replace(gpu, **card), Assumptions(**rest)


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
