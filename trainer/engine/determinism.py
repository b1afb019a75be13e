"""Deterministic algorithms on CUDA: the same step gives the same bits. The CPU needs none of this."""

import os

import torch

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
