"""The console line of a record, and the metrics that the driver shows."""

from collections.abc import Mapping
from datetime import timedelta

GIGA = 1e9


def console_line(name: str, step: int, steps: int, metrics: Mapping[str, float]) -> str:
    """Return one line: where, losses, learning rate, speed, memory, last checkpoint, time left."""
    losses = " ".join(f"{key.removeprefix('loss/')} {metrics[key]:.3f}" for key in metrics if key.startswith("loss/"))
    parts = [f"{name} {step}/{steps} {step / steps:.1%}", losses, f"lr {metrics.get('optim/lr', 0):.2e}"]
    parts.append(f"{metrics['speed/images_per_second']:.1f} img/s")
    parts.append(f"wait {metrics['speed/data_wait_fraction']:.0%}")
    if "speed/mfu" in metrics:
        parts.append(f"MFU {metrics['speed/mfu']:.1%}")
    elif "speed/gigaflops_per_second_per_rank" in metrics:
        parts.append(f"{metrics['speed/gigaflops_per_second_per_rank']:.1f} GF/s")
    parts.append(f"mem {metrics['memory/gigabytes']:.2f} GB")
    age = metrics.get("checkpoint/age_seconds")
    parts.append("ckpt none" if age is None else f"ckpt {age:.0f} s ago")
    left = timedelta(seconds=round((steps - step) * metrics["speed/step_seconds"]))
    parts.append(f"ETA {left}")
    return " | ".join(parts)


def evaluation_line(name: str, step: int, steps: int, metrics: Mapping[str, float]) -> str:
    """Return one line with the metrics of an evaluation."""
    shown = " ".join(f"{key.removeprefix('eval/')} {value:.3f}" for key, value in metrics.items())
    return f"{name} {step}/{steps} held out | {shown}"


def driver_metrics(step: int, metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics that whoever started the run shows and exports, under the names it knows."""
    names = {
        "loss/total": "loss",
        "speed/images_per_second": "samples_per_second",
        "speed/step_seconds": "seconds_per_step",
        "speed/data_wait_fraction": "data_wait_fraction",
        "checkpoint/blocking_seconds": "checkpoint_stall_seconds",
        "checkpoint/age_seconds": "checkpoint_age_seconds",
        "checkpoint/step": "committed_step",
        "goodput/fraction": "goodput",
    }
    chosen = {names[key]: value for key, value in metrics.items() if key in names}
    return {"step": float(step), "memory_bytes": metrics["memory/gigabytes"] * GIGA, **chosen}
