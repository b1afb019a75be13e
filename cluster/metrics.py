"""Figures of a run for Prometheus, through Ray's metrics agent: every name starts with `ray_isthmus_`."""

from ray.util.metrics import Gauge

TAGS = ("run", "stage")
WORKER_GAUGES = {
    "step": "Optimizer step",
    "loss": "Loss of the global batch",
    "samples_per_second": "Samples trained per second over all ranks",
    "seconds_per_step": "Time of a step",
    "data_wait_fraction": "Share of time in which the step waits for data",
    "checkpoint_age_seconds": "Age of the last committed checkpoint",
    "checkpoint_stall_seconds": "Time for which the last save stopped training",
    "goodput": "Share of the run's time spent computing steps that count",
    "memory_bytes": "Memory of the fullest rank",
}
"""The figures of trainer.watch.report_figures that are worth a graph."""
DRIVER_GAUGES = {
    "world_size": "Training processes",
    "restarts": "Restarts of the run, whatever the cause",
    "lost_steps": "Steps trained again after restarts, in all",
    "recovery_seconds": "Time from the last failure to the next step",
}


class Gauges:
    """Gauges of one stage of one run; figures without a gauge are left out."""

    def __init__(self, run: str, stage: str, descriptions: dict[str, str] | None = None) -> None:
        """Register the gauges with Ray's metrics agent."""
        chosen = WORKER_GAUGES if descriptions is None else descriptions
        self._gauges = {name: Gauge(f"isthmus_{name}", text, TAGS) for name, text in chosen.items()}
        self._tags = {"run": run, "stage": stage}

    @staticmethod
    def off() -> "Gauges":
        """Return gauges that record nothing, for ranks other than 0."""
        return Gauges("", "", {})

    def set(self, figures: dict[str, float]) -> None:
        """Record the newest figures."""
        for name, value in figures.items():
            if name in self._gauges:
                self._gauges[name].set(value, self._tags)
