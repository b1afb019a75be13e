"""Turn the JSON of a GPU run into a page: `python -m benchmarks.gpu.table all.json > docs/benchmarks/gpu.md`."""

import json
import sys
from pathlib import Path
from typing import Any

# The goals of docs/gpu-checklist.md: stage name, figure, least value, how it is shown.
GOALS = (
    ("stage1_100", "mfu", 0.40, "stage 1, ViT-g, 100 rows: MFU"),
    ("stage1_100", "images_per_second", 600.0, "stage 1, ViT-g, 100 rows: images/s"),
    ("stage2_100", "mfu", 0.40, "stage 2, OPT-2.7B, 100 rows: MFU"),
)
PEERS = (
    ("stage1_100", "plain1_100", 1.0, "stage 1 beside the plain path"),
    ("stage2_100", "hf2_100", 1.3, "stage 2 beside transformers"),
)
WITHIN = 0.15
VERSIONS = ("torch", "cuda", "transformers", "deepspeed")


def page(found: dict[str, Any], title: str = "# One GPU, measured") -> str:
    """Return the page as Markdown; what was not measured is said, not left out."""
    stages = found["stages"]
    environment = stages.get("env", {})
    device = environment.get("device", "no GPU")
    versions = ", ".join(
        f"{name} {environment[name]}"
        for name in ("torch", "cuda", "transformers", "deepspeed")
        if environment.get(name)
    )
    lines = [
        title,
        "",
        f"{device}; {versions}; `bash benchmarks/gpu/run.sh`, {environment.get('date', 'no date')}.",
        "",
    ]
    lines += [*_goals(stages), "", *_speeds(stages), "", *_time(stages), "", *_checks(stages), "", *_states(found)]
    return "\n".join(lines) + "\n"


def _goals(stages: dict[str, Any]) -> list[str]:
    lines = ["| goal | wanted | measured | reached |", "|---|---|---|---|"]
    for stage, figure, wanted, title in GOALS:
        lines.append(_goal(title, f">= {wanted:g}", stages.get(stage, {}).get("speed", {}).get(figure), wanted))
    for ours, theirs, wanted, title in PEERS:
        rates = [stages.get(name, {}).get("speed", {}).get("images_per_second") for name in (ours, theirs)]
        ratio = rates[0] / rates[1] if all(rates) else None
        lines.append(_goal(f"{title}: ratio of images/s", f">= {wanted:g}", ratio, wanted))
    for stage in ("stage1_100", "stage2_100"):
        ratio = stages.get(stage, {}).get("estimated_over_measured_step")
        reached = "-" if ratio is None else "yes" if abs(ratio - 1) <= WITHIN else "no"
        lines.append(f"| {stage}: estimated step over measured | 1 +- {WITHIN} | {_number(ratio)} | {reached} |")
    return lines


def _goal(title: str, wanted: str, value: float | None, least: float) -> str:
    reached = "-" if value is None else "yes" if value >= least else "no"
    return f"| {title} | {wanted} | {_number(value)} | {reached} |"


def _speeds(stages: dict[str, Any]) -> list[str]:
    lines = [
        "| stage | step, ms | images/s | TFLOP/s | MFU | peak GiB allocated | host syncs a step |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in stages.items():
        if speed := found.get("speed"):
            figures = [speed.get(key) for key in ("step_ms", "images_per_second", "tflop_per_second", "mfu")]
            figures += [found.get("memory", {}).get("peak_allocated_gib"), found.get("host_syncs", {}).get("total")]
            lines.append(f"| {name} | {' | '.join(map(_number, figures))} |")
    return lines


def _time(stages: dict[str, Any]) -> list[str]:
    lines = ["| stage | device busy, ms | idle, ms | kernels | by family, ms |", "|---|---|---|---|---|"]
    for name, found in stages.items():
        if kernels := found.get("kernels"):
            families = ", ".join(f"{family} {ms}" for family, ms in kernels["families_ms"].items())
            figures = (kernels["busy_ms"], kernels["idle_ms"], kernels["kernels_per_step"])
            lines.append(f"| {name} | {' | '.join(map(_number, figures))} | {families} |")
    return lines


def _checks(stages: dict[str, Any]) -> list[str]:
    lines = ["| check | result |", "|---|---|"]
    for name in ("gpu_tests", "job", "restore"):
        for key, value in stages.get(name, {}).items():
            if isinstance(value, bool | int | float | str) and key not in ("log", "error"):
                lines.append(f"| {name}: {key} | {value if isinstance(value, bool | str) else _number(value)} |")
    return lines


def _states(found: dict[str, Any]) -> list[str]:
    lines = ["| stage | ended | seconds |", "|---|---|---|"]
    for name, line in found["summary"].items():
        error = f": {line['error'].strip().splitlines()[-1]}" if line.get("error") else ""
        lines.append(f"| {name} | {line['state']}{error} | {_number(line.get('wall_s'))} |")
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


if __name__ == "__main__":
    sys.stdout.write(page(json.loads(Path(sys.argv[1]).read_text())))
