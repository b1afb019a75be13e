"""Preflight's check of the network between the workers: correctness and bandwidth of an all-reduce."""

import json
import time

import torch
import torch.distributed as dist

from isthmus.cluster.workers.actor import Assignment, RayContext
from isthmus.trainer.engine.process_group import process_group

GPU_ELEMENTS, CPU_ELEMENTS = 64 << 20, 1 << 20
ROUNDS = 5
LIMIT_SECONDS = 60.0


def train(_assignment: Assignment, context: RayContext) -> str:
    """All-reduce fp32 vectors over all ranks; return JSON with `correct`, `gigabytes_per_second` and `backend`.

    The bandwidth is the algorithm's: bytes that each rank must send and receive, 2 (W - 1) / W of the vector
    (as nccl-tests count it), over the time of the slowest of some rounds.
    """
    rank = context.rank
    context.serve_rendezvous()
    with process_group(rank, LIMIT_SECONDS) as device:
        gpu = device.type == "cuda"
        vector = torch.full((GPU_ELEMENTS if gpu else CPU_ELEMENTS,), float(rank.rank + 1), device=device)
        dist.all_reduce(vector)
        expected = rank.world_size * (rank.world_size + 1) / 2
        correct = bool((vector == expected).all())
        seconds = max(_time_one(vector) for _ in range(ROUNDS))
    moved = 2 * (rank.world_size - 1) / rank.world_size * vector.numel() * vector.element_size()
    backend = "nccl" if gpu else "gloo"
    return json.dumps({"correct": correct, "gigabytes_per_second": moved / seconds / 1e9, "backend": backend})


def _time_one(vector: torch.Tensor) -> float:
    began = time.perf_counter()
    dist.all_reduce(vector)
    if vector.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began
