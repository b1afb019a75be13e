"""An estimate as rows of text and as a figure."""

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from isthmus.trainer.estimate.hardware import GIB, Assumptions, Cluster, Gpu
from isthmus.trainer.estimate.step import StageEstimate

GIGA, TERA, PETA = 1e9, 1e12, 1e15


def rows(estimate: StageEstimate, price_per_gpu_hour: float | None) -> list[tuple[str, str]]:
    """Return (label, value) pairs of one stage, units in the values."""
    memory = estimate.memory
    parts = ", ".join(
        f"{field.name.replace('_', ' ')} {getattr(memory, field.name) / GIB:.2f}" for field in fields(memory)
    )
    seconds = ", ".join(f"{part} {value:.3f}" for part, value in estimate.seconds.items())
    traffic = ", ".join(f"{kind} {value / GIGA:.2f}" for kind, value in vars(estimate.traffic).items())
    table = [
        ("memory per GPU", f"{memory.total / GIB:.1f} GiB at micro-batch {estimate.micro_batch}"),
        ("  of it (GiB)", parts),
        ("  with activation checkpointing", f"{estimate.memory_checkpointed.total / GIB:.1f} GiB"),
        ("largest micro-batch that fits", str(estimate.largest_micro_batch)),
        ("work per sample", f"{estimate.work.total / GIGA:.1f} GFLOP, of it vision {estimate.work.vision / GIGA:.1f}"),
        ("work per step", f"{estimate.work.total * estimate.global_batch_size / PETA:.2f} PFLOP"),
        ("received per rank and step", f"{estimate.traffic.total / GIGA:.2f} GB ({traffic})"),
        ("step", f"{estimate.step_seconds:.3f} s ({seconds}); bottleneck: {estimate.bottleneck}"),
        ("throughput", f"{estimate.samples_per_second:.0f} images/s, {estimate.mfu:.0%} of peak"),
        ("duration", f"{estimate.days:.2f} days, {estimate.gpu_hours:,.0f} GPU hours"),
        ("reader CPU cores", f"{estimate.reader_cores:.1f}"),
        ("object store", f"{estimate.storage_bytes / TERA:.1f} TB in {estimate.storage_requests:,.0f} requests"),
        ("checkpoint every", f"{estimate.checkpoint_interval_seconds / 60:.1f} min (Young-Daly)"),
        ("recommended", estimate.recommendation),
        *(("WARNING", warning) for warning in estimate.warnings),
    ]
    if price_per_gpu_hour is not None:
        table.insert(10, ("cost", f"{estimate.gpu_hours * price_per_gpu_hour:,.0f} at {price_per_gpu_hour}/GPU hour"))
    return table


def as_json(estimate: StageEstimate, price_per_gpu_hour: float | None) -> dict[str, Any]:
    """Return an estimate as plain data; bytes, seconds and operations without scaling."""
    data = asdict(estimate)
    data["memory"]["total"] = estimate.memory.total
    data["work"]["total"] = estimate.work.total
    data["bottleneck"] = estimate.bottleneck
    data["cost"] = None if price_per_gpu_hour is None else estimate.gpu_hours * price_per_gpu_hour
    return data


def sweep_rows(sizes: Sequence[int], sweep: Sequence[Sequence[StageEstimate]]) -> list[list[str]]:
    """Return a header and one row of text per size and stage; `sweep` as for `draw_sweep`."""
    table = [["GPUs", "stage", "global batch", "images/s", "of linear", "bottleneck", "days", "GPU hours"]]
    for size, estimates in zip(sizes, sweep, strict=True):
        for first, estimate in zip(sweep[0], estimates, strict=True):
            linear = first.samples_per_second * size / sizes[0]
            table.append([
                str(size), estimate.stage, f"{estimate.global_batch_size:,}", f"{estimate.samples_per_second:,.0f}",
                f"{estimate.samples_per_second / linear:.0%}", estimate.bottleneck, f"{estimate.days:.2f}",
                f"{estimate.gpu_hours:,.0f}",
            ])  # fmt: skip
    return table


def assumption_lines(gpu: Gpu, assumptions: Assumptions) -> list[str]:
    """Return every assumption as name=value, in the form in which it can be overridden: the card's figures first."""
    figures = {name: value for name, value in vars(gpu).items() if name not in ("name", "device_name")} | vars(
        assumptions
    )
    return [f"{name}={value:g}" for name, value in figures.items()]


def draw(estimates: Sequence[StageEstimate], cluster: Cluster, path: Path) -> None:
    """Write a PNG: memory of each stage compared with the card's, and the parts of its step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow to import
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    memory_axis, time_axis = figure.subplots(1, 2)
    stages = [estimate.stage for estimate in estimates]
    _stack(memory_axis, stages, [{k: v / GIB for k, v in vars(e.memory).items()} for e in estimates])
    memory_axis.axhline(cluster.gpu.memory_bytes / GIB, color="black", linestyle="--", label="the card")
    memory_axis.set(title="Memory per GPU", ylabel="GiB")
    memory_axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    _side_by_side(time_axis, stages, [e.seconds | {"step": e.step_seconds} for e in estimates])
    time_axis.set(title="Step: each part alone, and the whole", ylabel="seconds")
    figure.suptitle(f"Predicted: {cluster.num_gpus} x {cluster.gpu.name}")
    figure.savefig(path, dpi=120)


def draw_sweep(sizes: Sequence[int], sweep: Sequence[Sequence[StageEstimate]], gpu: str, path: Path) -> None:
    """Write a PNG: images per second of each stage against the number of GPUs, compared with linear growth.

    `sweep` holds the estimates of all stages for each size.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow to import
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for estimates in zip(*sweep, strict=True):
        stage, speeds = estimates[0].stage, [estimate.samples_per_second for estimate in estimates]
        (line,) = axis.plot(sizes, speeds, marker="o", label=stage)
        linear = [speeds[0] * size / sizes[0] for size in sizes]
        axis.plot(sizes, linear, linestyle=":", color=line.get_color(), label=f"{stage}, linear")
    axis.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="images per second", title=f"Predicted: {gpu}")
    axis.set_xticks(list(sizes), [str(size) for size in sizes])
    axis.set_xticks([], minor=True)
    axis.legend()
    figure.savefig(path, dpi=120)


def _stack(axis: Any, stages: Sequence[str], parts: Sequence[dict[str, float]]) -> None:
    bottom = [0.0] * len(stages)
    for name in parts[0]:
        heights = [part[name] for part in parts]
        axis.bar(stages, heights, bottom=bottom, label=name.replace("_", " "))
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]


def _side_by_side(axis: Any, stages: Sequence[str], parts: Sequence[dict[str, float]]) -> None:
    width = 0.8 / len(parts[0])
    for i, name in enumerate(parts[0]):
        places = [stage - 0.4 + (i + 0.5) * width for stage in range(len(stages))]
        color = "black" if name == "step" else None
        axis.bar(places, [part[name] for part in parts], width=width, label=name, color=color)
    axis.set_xticks(range(len(stages)), stages)
    axis.legend(fontsize=7)
