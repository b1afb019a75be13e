"""Measuring on a GPU: seconds of steps, host syncs, kernels, memory and FLOPs. On a CPU device parts are empty."""

import collections
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Step = Callable[[int], object]
# Marks in kernel names, in the order in which they are tried.
FAMILIES = {
    "gemm": ("gemm", "xmma", "nvjet", "cutlass", "cublas"),
    "attention": ("fmha", "flash", "attention", "cudnn"),
    "copy, cast": ("copy", "Memcpy", "Memset", "convert", "CatArray"),
    "layer norm": ("layer_norm", "LayerNorm"),
    "elementwise": ("elementwise", "dropout", "Gelu"),
    "softmax, loss": ("softmax", "nll", "SoftMax"),
    "optimizer": ("multi_tensor", "adam", "Adam"),
}
_LONG_GAP_US = 50


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(step: Step, warm_up: int, steps: int) -> dict[str, float]:
    """Time `steps` calls after `warm_up` ones: each alone (synchronised), and all in a row."""
    for i in range(warm_up):
        step(i)
    alone = []
    for i in range(steps):
        synchronize()
        began = time.perf_counter()
        step(warm_up + i)
        synchronize()
        alone.append(time.perf_counter() - began)
    began = time.perf_counter()
    for i in range(steps):
        step(warm_up + steps + i)
    synchronize()
    in_a_row = (time.perf_counter() - began) / steps
    return {"median_s": statistics.median(alone), "min_s": min(alone), "mean_in_a_row_s": in_a_row}


def speed(num_images: int, seconds: float, flops: float, peak_flops: float | None) -> dict[str, float]:
    """Return images and TFLOP per second and, where the card's peak is known, the share of it (MFU)."""
    found = {
        "images_per_second": num_images / seconds,
        "step_ms": 1e3 * seconds,
        "gflop_per_image": flops / num_images / 1e9,
        "tflop_per_second": flops / seconds / 1e12,
    }
    return found | ({"mfu": flops / seconds / peak_flops} if peak_flops else {})


def memory() -> dict[str, float]:
    """Return GiB at the peak since the last reset, as allocated, as reserved, and as the card counts it."""
    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    return {
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        "used_of_card_gib": (total - free) / 2**30,
    }


def host_syncs(step: Step) -> dict[str, Any]:
    """Return where one step makes the host wait for the device: `file:line` and how often."""
    if not torch.cuda.is_available():
        return {}
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            step(90)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [w for w in seen if "synchroniz" in str(w.message)]
    places = collections.Counter(f"{Path(w.filename).parent.name}/{Path(w.filename).name}:{w.lineno}" for w in found)
    return {"total": len(found), "places": dict(places.most_common(40))}


def kernels(step: Step, trace: Path, steps: int = 2) -> dict[str, Any]:
    """Profile `steps` calls: kernel time by family, the longest kernels, how long the device was idle.

    Args:
        step: One training step.
        trace: Where the trace for Perfetto is written.
        steps: Calls to profile.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as run:
        for i in range(steps):
            step(50 + i)
        synchronize()
    run.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    on_device = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    return kernel_table(sorted(on_device, key=lambda event: event["ts"]), steps)


def kernel_table(events: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Sum up device events (`name`, `ts` and `dur` in microseconds, sorted by start) per step."""
    if not events:
        return {}
    micros, calls, families = collections.Counter[str](), collections.Counter[str](), collections.Counter[str]()
    for event in events:
        name = event["name"][:110]
        micros[name] += event["dur"]
        calls[name] += 1
        families[family_of(name)] += event["dur"]
    busy, end, gaps = 0.0, events[0]["ts"], []
    for event in events:
        if event["ts"] > end:
            gaps.append((event["ts"] - end, event["name"][:80]))
        finish = event["ts"] + event["dur"]
        busy += max(0.0, finish - max(end, event["ts"]))
        end = max(end, finish)
    window = end - events[0]["ts"]
    long_gaps = [gap for gap, _ in gaps if gap > _LONG_GAP_US]
    return {
        "busy_ms": busy / 1e3 / steps,
        "idle_ms": (window - busy) / 1e3 / steps,
        "kernels_per_step": len(events) / steps,
        "families_ms": {name: round(total / 1e3 / steps, 2) for name, total in families.most_common()},
        "longest_kernels": [
            {"name": name, "ms": round(total / 1e3 / steps, 3), "calls": calls[name] / steps}
            for name, total in micros.most_common(25)
        ],
        "gaps_over_50us": {"count": len(long_gaps) / steps, "ms": sum(long_gaps) / 1e3 / steps},
        "longest_gaps": [{"us": round(gap), "before": name} for gap, name in sorted(gaps, reverse=True)[:12]],
    }


def family_of(kernel: str) -> str:
    """Return the family of a kernel by its name."""
    return next((family for family, marks in FAMILIES.items() if any(mark in kernel for mark in marks)), "other")
