"""Preflight's look at the network between the workers: is the sum right, and how fast does it come?"""

import json
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from isthmus.cluster.workers.actor import Assignment
from isthmus.trainer.context import RunContext

GPU_ELEMENTS, CPU_ELEMENTS = 64 << 20, 1 << 20
ROUNDS = 5
LIMIT = timedelta(seconds=60)


def train(assignment: Assignment, _context: RunContext) -> str:
    """All-reduce fp32 vectors over all ranks; return JSON with `correct`, `gigabytes_per_second` and `backend`.

    The bandwidth is the algorithm's: bytes that each rank must send and receive, 2 (W - 1) / W of the vector
    (as nccl-tests count it), over the time of the slowest of some rounds.
    """
    rank = assignment.rank
    gpu = torch.cuda.is_available() and assignment.config.cluster.workers.gpus > 0
    backend = "nccl" if gpu else "gloo"
    device = torch.device("cuda", rank.local_rank % torch.cuda.device_count()) if gpu else torch.device("cpu")
    dist.init_process_group(backend, rank=rank.rank, world_size=rank.world_size, timeout=LIMIT)
    try:
        vector = torch.full((GPU_ELEMENTS if gpu else CPU_ELEMENTS,), float(rank.rank + 1), device=device)
        dist.all_reduce(vector)
        expected = rank.world_size * (rank.world_size + 1) / 2
        correct = bool((vector == expected).all())
        seconds = max(_time_one(vector) for _ in range(ROUNDS))
    finally:
        dist.destroy_process_group()
    moved = 2 * (rank.world_size - 1) / rank.world_size * vector.numel() * vector.element_size()
    return json.dumps({"correct": correct, "gigabytes_per_second": moved / seconds / 1e9, "backend": backend})


def _time_one(vector: torch.Tensor) -> float:
    began = time.perf_counter()
    dist.all_reduce(vector)
    if vector.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began
