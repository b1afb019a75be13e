"""DeepSpeed's import and the process group: nothing compiles, nothing chats, no wait is endless."""

import datetime
import gc
import importlib
import logging
import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from isthmus.trainer.context import Rank
from isthmus.trainer.errors import TrainerError

MUON = "deepspeed.runtime.zero.muon.original_muon"
_SETTLE_SECONDS = 0.2
_own_group = False


def load_deepspeed() -> Any:
    """Import DeepSpeed for the accelerator at hand; on the CPU without the kernel that it would compile.

    That kernel (shared-memory all-reduce) serves inference only; compiling it takes a minute or many, and a compile
    that is killed leaves a lock at which all later ones wait for ever.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed  # noqa: PLC0415 - reads DS_ACCELERATOR while it is imported, and that takes seconds

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    _import_muon()
    if not torch.cuda.is_available():
        # `deepspeed.comm.torch` as an attribute is PyTorch itself; only sys.modules has the module of that name.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    return deepspeed


def _import_muon() -> None:
    """Import the optimizer Muon, which DeepSpeed imports with every engine, without its decorators of `torch.compile`.

    We do not use it, and they import TorchInductor: two CPU seconds of every start.
    """
    if MUON in sys.modules:
        return
    compiler = importlib.import_module("deepspeed.runtime.compiler")
    compiled, compiler.compile = compiler.compile, lambda: lambda function: function  # type: ignore[attr-defined]
    try:
        importlib.import_module(MUON)
    finally:
        compiler.compile = compiled  # type: ignore[attr-defined]


def device_of(rank: Rank) -> torch.device:
    """Return this rank's device and make it the current one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", rank.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def join_process_group(rank: Rank, timeout_seconds: float) -> None:
    """Make sure that there is a process group and that DeepSpeed knows it; one that exists is used as it is.

    Raises:
        TrainerError: several ranks, but nothing in the environment says where they meet.
    """
    global _own_group  # noqa: PLW0603 - the process group is global state of the process too
    deepspeed = load_deepspeed()
    timeout = datetime.timedelta(seconds=timeout_seconds)
    limit_new_groups(timeout)
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if rank.world_size == 1:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        elif "MASTER_ADDR" in os.environ:
            dist.init_process_group(backend, rank=rank.rank, world_size=rank.world_size, timeout=timeout)
        else:
            raise TrainerError(
                f"rank {rank.rank} of {rank.world_size}: MASTER_ADDR is not set, so the ranks cannot meet; "
                "start them with `isthmus train` or torchrun"
            )
        _own_group = True
    deepspeed.init_distributed(dist.get_backend(), timeout=timeout, verbose=False)


def limit_new_groups(timeout: datetime.timedelta) -> None:
    """Make our limit that of the groups to come: DeepSpeed names none, and PyTorch's is half an hour."""
    groups = dist.distributed_c10d
    groups.default_pg_timeout = groups.default_pg_nccl_timeout = timeout  # type: ignore[attr-defined]


def let_gloo_settle() -> None:
    """Give gloo's threads the interpreter for a moment, to free the tensors of operations that have finished.

    Such a thread that still waits for the interpreter when the process ends aborts it ("terminate called without an
    active exception"): seen in a quarter of all ZeRO-3 processes on the CPU that ended right after a step.
    """
    if dist.is_initialized() and dist.get_backend() == "gloo":
        gc.collect()
        time.sleep(_SETTLE_SECONDS)


def leave_process_group() -> None:
    """Destroy the process group if `join_process_group` made it."""
    global _own_group  # noqa: PLW0603 - see above
    if _own_group and dist.is_initialized():
        load_deepspeed().comm.destroy_process_group()
    _own_group = False
