"""Every place where DeepSpeed's or torch's own behaviour is patched, each with its reason.

tests/integration/test_workarounds.py fails for each of these that is no longer needed, except `drain_gloo`, whose
reason is a race that a test cannot provoke.
"""

import datetime
import gc
import importlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

MUON = "deepspeed.runtime.zero.muon.original_muon"
GLOO_DRAIN_SECONDS = 0.2


def load_deepspeed() -> Any:
    """Import DeepSpeed for this machine's accelerator, quietly and without compiling; show it the process group.

    On the CPU its first use of a process group compiles the shared-memory all-reduce of `deepspeed_shm_comm`, which
    only inference calls. That takes a minute or more, and a killed compilation leaves a lock file on which all later
    ones wait forever.
    """
    if "DS_ACCELERATOR" not in os.environ:  # asking starts CUDA, which a process without a GPU yet must not
        os.environ["DS_ACCELERATOR"] = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ.setdefault("LOCAL_RANK", "0")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed  # noqa: PLC0415 - reads DS_ACCELERATOR while it is imported, and that takes seconds

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    _import_muon()
    # `deepspeed.comm.torch` as an attribute is PyTorch itself; only sys.modules has the module of that name.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    if dist.is_initialized() and not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(verbose=False)
    return deepspeed


def _import_muon() -> None:
    """Import the optimizer Muon, which DeepSpeed imports with every engine, without its `torch.compile` decorators.

    It is not used here, and the decorators import TorchInductor: two CPU seconds of every start.
    """
    if MUON in sys.modules:
        return
    compiler = importlib.import_module("deepspeed.runtime.compiler")
    compiled, compiler.compile = compiler.compile, lambda: lambda function: function  # type: ignore[attr-defined]
    try:
        importlib.import_module(MUON)
    finally:
        compiler.compile = compiled  # type: ignore[attr-defined]


@contextmanager
def without_broadcast(deepspeed: Any) -> Iterator[None]:
    """Let DeepSpeed not broadcast the parameters of a module from rank 0.

    A checkpoint brings other values, and it views tensors as bytes, which 0-d tensors cannot be.
    """
    engine = deepspeed.DeepSpeedEngine
    broadcast, engine._broadcast_model = engine._broadcast_model, lambda _self: None
    try:
        yield
    finally:
        engine._broadcast_model = broadcast


def drop_accumulation(engine: Any, accumulation: ExitStack) -> None:
    """End `coalesce_grad_reduction` without its reduction: the peers may be gone, or already be in another group.

    It reduces however it ends, even when it is garbage-collected much later.
    """
    engine._flush_coalesced_reduction_zero12 = engine._flush_coalesced_reduction_zero3 = lambda _optimizer: None
    accumulation.close()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Give modules built inside parameters without memory; buffers are real.

    `torch.device("meta")` would take the buffers' contents too, and these are computed when a module is built.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def limit_new_groups(timeout: datetime.timedelta) -> None:
    """Set the default time limit of groups created later: DeepSpeed creates some without one (30 minutes)."""
    groups = dist.distributed_c10d
    groups.default_pg_timeout = groups.default_pg_nccl_timeout = timeout  # type: ignore[attr-defined]


def drain_gloo() -> None:
    """Give gloo's threads time to take the interpreter lock and free the tensors of finished operations.

    A thread that still waits for the lock when the process ends aborts it ("terminate called without an active
    exception"): seen in a quarter of ZeRO-3 processes on the CPU that ended right after a step.
    """
    if dist.is_initialized():
        gc.collect()
        time.sleep(GLOO_DRAIN_SECONDS)
