"""Reference bands of the demo's curves: created from runs, compared with a run. The format is in docs/curves/README.md.

`python -m isthmus.demo.curves docs/curves/demo.json RUN_URL...` writes a band around the given runs.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from isthmus.cluster.errors import ClusterError
from isthmus.cluster.report.folder import RunFacts, StageFacts, read_folder
from isthmus.data_pipeline.store.object_store import ObjectStore

FIGURES = ("loss/", "eval/")
TOLERANCE = 0.15
LEAST_MARGIN = 0.02
"""For figures near zero: a share that is 0 in the runs may be a little more in another."""
SMOOTHED_POINTS = 10
"""Logged losses whose mean is compared: each one is that of a single batch, which differs more than runs do."""


class Limits(BaseModel):
    """Where a figure should lie at a step."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    low: float
    high: float


class Band(BaseModel):
    """Limits by stage, figure and step."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    recipe: str
    """Recipe whose runs these are."""
    runs: int
    """Number of runs that the band was made of."""
    tolerance: float
    """Share of the value added on both sides, and at least LEAST_MARGIN."""
    stages: dict[str, dict[str, dict[int, Limits]]]


class Shortfall(NamedTuple):
    """One point at which a run learned less than the reference runs."""

    stage: str
    figure: str
    step: int
    value: float
    limits: Limits


def load_band(path: Path) -> Band | None:
    """Return the band of a file, or None if the file does not exist.

    Raises:
        ClusterError: it is damaged.
    """
    if not path.exists():
        return None
    try:
        return Band.model_validate_json(path.read_text())
    except (ValidationError, ValueError) as error:
        raise ClusterError(f"{path}: not a reference band ({error}); see docs/curves/README.md") from error


def make_band(recipe: str, runs: Sequence[RunFacts], tolerance: float = TOLERANCE) -> Band:
    """Return the band around runs: lowest to highest value at each step, and the tolerance on each side."""
    values: dict[str, dict[str, dict[int, list[float]]]] = {}
    for run in runs:
        for name, stage in run.stages.items():
            for figure in (name for prefix in FIGURES for name in stage.names(prefix)):
                for step, value in _points(stage, figure).items():
                    values.setdefault(name, {}).setdefault(figure, {}).setdefault(step, []).append(value)
    stages = {
        stage: {
            figure: {step: _around(found, tolerance) for step, found in sorted(steps.items())}
            for figure, steps in figures.items()
        }
        for stage, figures in values.items()
    }
    return Band(recipe=recipe, runs=len(runs), tolerance=tolerance, stages=stages)


def compare(band: Band, run: RunFacts) -> tuple[int, list[Shortfall]]:
    """Return how many points of the band the run has, and those of them that are worse than the band."""
    compared, worse = 0, []
    for stage, figures in band.stages.items():
        for figure, steps in figures.items():
            found = _points(run.stages[stage], figure) if stage in run.stages else {}
            for step, limits in steps.items():
                if step in found:
                    compared += 1
                    if _is_worse(figure, found[step], limits):
                        worse.append(Shortfall(stage, figure, step, found[step], limits))
    return compared, worse


def verdict(band: Band | None, run: RunFacts) -> str:
    """Say in a line or two whether a run learned what the reference runs did."""
    if band is None:
        return "not compared: there are no reference runs of this recipe"
    compared, worse = compare(band, run)
    runs = f"{band.runs} reference run{'s' if band.runs > 1 else ''}"
    if not compared:
        return f"not compared: this run has no point in common with the {runs}"
    if not worse:
        return f"learned as expected: all {compared} points are in the range of {runs}, or better"
    first = ", ".join(
        f"{s.stage} {s.figure} at step {s.step}: {s.value:.3f}, expected {s.limits.low:.3f} to {s.limits.high:.3f}"
        for s in worse[:3]
    )
    return f"learned less than expected: {len(worse)} of {compared} points are worse than in {runs} ({first})"


def _points(stage: StageFacts, figure: str) -> dict[int, float]:
    """Return what is compared of a figure, by step: of a loss, the mean of the last logged ones."""
    series = [(int(step), value) for step, value in stage.series(figure)]
    if not figure.startswith("loss/"):
        return dict(series)
    values = [value for _, value in series]
    return {
        step: statistics.fmean(values[max(0, number - SMOOTHED_POINTS) : number])
        for number, (step, _) in enumerate(series, start=1)
    }


def _is_worse(figure: str, value: float, limits: Limits) -> bool:
    """Return whether a value is on the wrong side of its limits; the loss with a wrong image has no wrong side."""
    if figure.startswith("loss/") or figure == "eval/loss":
        return value > limits.high
    return figure != "eval/loss_wrong_image" and value < limits.low


def _around(values: list[float], tolerance: float) -> Limits:
    low, high = min(values), max(values)
    margin = max(tolerance * max(abs(low), abs(high)), LEAST_MARGIN)
    return Limits(low=low - margin, high=high + margin)


def main(out: str, *urls: str) -> int:
    """Write the band around finished runs."""
    store = ObjectStore()
    runs = [read_folder(url, store) for url in urls]
    band = make_band(f"recipes/{Path(out).stem}.yaml", runs)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps(band.model_dump(mode="json"), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
