"""This rank's device and the process group: the device is set first, and every collective has a time limit."""

import datetime
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from isthmus.trainer.context import Rank
from isthmus.trainer.engine.deepspeed_workarounds import drain_gloo, limit_new_groups
from isthmus.trainer.errors import TrainerError

FLIGHT_RECORDER = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
"""Remember the last collectives with their stacks: after a hang they tell which rank was where."""


def select_device(rank: Rank) -> torch.device:
    """Decide this rank's device, make it current, and let LOCAL_RANK, by which DeepSpeed picks a device, agree.

    A process that sees one GPU, as a Ray worker does, takes that one; a process that sees all GPUs of its node, as
    under torchrun, takes the one of its local rank. Without CUDA, or with DS_ACCELERATOR=cpu, the device is the CPU.

    Raises:
        TrainerError: the node has fewer GPUs than ranks, or this build of torch has no kernels for the GPU.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    index = 0 if count == 1 else rank.local_rank
    if index >= count:
        raise TrainerError(
            f"rank {rank.rank}: local rank {rank.local_rank}, but this node has {count} GPUs; "
            "start at most one rank per GPU (torchrun --nproc-per-node, cluster.workers)"
        )
    torch.cuda.set_device(index)
    os.environ["LOCAL_RANK"] = str(index)
    _check_architecture(index)
    return torch.device("cuda", index)


def _check_architecture(index: int) -> None:
    """Binaries run on GPUs of the same major version from their minor one on; PTX on all later ones."""
    major, minor = torch.cuda.get_device_capability(index)
    built_for = torch.cuda.get_arch_list()
    for name in built_for:
        kind, _, number = name.partition("_")
        version = divmod(int("".join(filter(str.isdigit, number))), 10)
        if version <= (major, minor) and (kind == "compute" or version[0] == major):
            return
    if built_for:
        raise TrainerError(
            f"{torch.cuda.get_device_name(index)} is sm_{major}{minor}, but this build of torch {torch.__version__} is "
            f"for {', '.join(built_for)}; install a build of torch for this GPU (https://pytorch.org), or set "
            "DS_ACCELERATOR=cpu"
        )


@contextmanager
def process_group(rank: Rank, timeout_seconds: float, *, deterministic: bool = False) -> Iterator[torch.device]:
    """Join the process group of all ranks and leave it at the end; yields this rank's device.

    Collectives on CPU tensors and objects use gloo, those on GPU tensors NCCL. A group that exists
    already is used as it is and left alone. `deterministic` must be known before CUDA and NCCL start.

    Raises:
        TrainerError: several ranks, but nothing in the environment says where they meet, or two ranks share a GPU.
    """
    set_determinism(enabled=deterministic)
    device = select_device(rank)
    timeout = datetime.timedelta(seconds=timeout_seconds)
    limit_new_groups(timeout)
    if dist.is_initialized():
        yield device
        return
    _init_group(rank, device, timeout)
    try:
        _check_one_rank_per_gpu(device)
        yield device
    finally:
        drain_gloo()
        _destroy_group()


def last_collectives() -> bytes | None:
    """Return what torch's flight recorder holds of this rank's last collectives, a pickle for `torchfrtrace`."""
    if not dist.is_initialized():
        return None
    dump: bytes = c10d._dump_fr_trace()  # type: ignore[attr-defined] # missing in torch's stubs
    return dump


def _init_group(rank: Rank, device: torch.device, timeout: datetime.timedelta) -> None:
    for name, value in FLIGHT_RECORDER.items():
        os.environ.setdefault(name, value)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if rank.world_size == 1:
        dist.init_process_group(backend, store=c10d.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    if "MASTER_ADDR" not in os.environ:
        raise TrainerError(
            f"rank {rank.rank} of {rank.world_size}: MASTER_ADDR is not set, so the ranks cannot meet; "
            "start them with `isthmus submit`, or `torchrun --nproc-per-node N -- isthmus train RECIPE --local`"
        )
    dist.init_process_group(
        backend,
        rank=rank.rank,
        world_size=rank.world_size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )


def _check_one_rank_per_gpu(device: torch.device) -> None:
    if device.type != "cuda" or dist.get_world_size() == 1:
        return
    uuids: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(uuids, str(torch.cuda.get_device_properties(device).uuid))
    shared = [i for i, uuid in enumerate(uuids) if uuids.count(uuid) > 1]
    if shared:
        raise TrainerError(
            f"ranks {shared[:8]} share a GPU; start at most one rank per GPU (torchrun --nproc-per-node, "
            "cluster.workers.gpus: 1)"
        )


def _destroy_group() -> None:
    """Destroy the group; through DeepSpeed if it has been loaded, because it has its own groups."""
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None and deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()
    else:
        dist.destroy_process_group()


ENVIRONMENT = {
    # cuBLAS picks split-K reductions by free workspace unless it has one of fixed size.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # In-network reductions and NVLS sum in an order of their own; a ring sums in rank order.
    "NCCL_ALGO": "Ring",
    "NCCL_NVLS_ENABLE": "0",
    "NCCL_COLLNET_ENABLE": "0",
}


def set_determinism(*, enabled: bool) -> None:
    """Turn deterministic algorithms on or off for this process. Call it before CUDA and NCCL are initialised.

    Attention then runs flash or memory-efficient kernels, whose backward is without atomics in this mode; cuDNN's is
    switched off. An operation without a deterministic implementation raises RuntimeError.
    """
    if enabled:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(enabled)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # costs a pass per tensor
    torch.backends.cudnn.deterministic = enabled
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(not enabled)
