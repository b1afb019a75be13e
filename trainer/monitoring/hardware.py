"""This rank's device: memory in use, peak rate."""

import psutil
import torch

from isthmus.trainer.estimate.hardware import gpu_of_device


def peak_memory_bytes(device: torch.device) -> float:
    """Return the peak memory of the device since `reset_peak_memory`, or this process's resident memory on the CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return float(psutil.Process().memory_info().rss)


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new measurement of the peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def allocator_retries(device: torch.device) -> float:
    """Return how often the allocator had to free its cache to serve a request, since the start; 0 on the CPU."""
    if device.type != "cuda":
        return 0.0
    return float(torch.cuda.memory_stats(device).get("num_alloc_retries", 0))


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bf16 peak of a known GPU in FLOP/s; none for other devices."""
    if device.type != "cuda":
        return None
    gpu = gpu_of_device(torch.cuda.get_device_name(device))
    return gpu.peak_flops if gpu else None
