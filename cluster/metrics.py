"""Metrics of a run for Prometheus, through Ray's metrics agent: every name starts with `ray_isthmus_`."""

from ray.util.metrics import Counter, Gauge

TAGS = ("run", "stage")
WORKER_GAUGES = {
    "step": ("step", "Optimizer step"),
    "loss": ("loss", "Loss of the global batch"),
    "samples_per_second": ("samples_per_second", "Samples trained per second over all ranks"),
    "seconds_per_step": ("step_seconds", "Time of a step"),
    "data_wait_fraction": ("data_wait_ratio", "Share of time in which the step waits for data"),
    "checkpoint_age_seconds": ("checkpoint_age_seconds", "Age of the last committed checkpoint"),
    "checkpoint_stall_seconds": ("checkpoint_blocking_seconds", "Time for which the last save blocked training"),
    "goodput": ("goodput_ratio", "Share of the run's time spent computing steps that count"),
    "memory_bytes": ("memory_bytes", "Memory of the fullest rank"),
}
"""Figure of isthmus.trainer.monitoring that is worth a graph -> name of its metric and description."""
DRIVER_METRICS = {
    "world_size": "Training processes",
    "restarts_total": "Restarts of the run, for any cause",
    "lost_steps_total": "Steps trained again after restarts",
    "recovery_seconds": "Time from the last failure to the next step",
}


class Gauges:
    """Gauges of one stage of one run; figures without a gauge are left out."""

    def __init__(self, run: str, stage: str, names: dict[str, tuple[str, str]] | None = None) -> None:
        """Register the gauges with Ray's metrics agent."""
        chosen = WORKER_GAUGES if names is None else names
        self._gauges = {figure: Gauge(f"isthmus_{name}", text, TAGS) for figure, (name, text) in chosen.items()}
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


class DriverMetrics:
    """What the driver counts; its counters begin at 0 with each driver, as Prometheus expects of a counter."""

    def __init__(self, run: str) -> None:
        """Register the metrics with Ray's metrics agent."""
        self._tags = {"run": run, "stage": ""}
        self._world_size, self._recovery = (
            Gauge(f"isthmus_{name}", DRIVER_METRICS[name], TAGS) for name in ("world_size", "recovery_seconds")
        )
        self._restarts, self._lost_steps = (
            Counter(f"isthmus_{name}", DRIVER_METRICS[name], TAGS) for name in ("restarts_total", "lost_steps_total")
        )

    def world_size(self, size: int) -> None:
        """Record the size of the group."""
        self._world_size.set(float(size), self._tags)

    def restarted(self) -> None:
        """Count a restart."""
        self._restarts.inc(1.0, self._tags)

    def recovered(self, lost_steps: int, seconds: float) -> None:
        """Record what the last restart cost."""
        self._recovery.set(seconds, self._tags)
        if lost_steps:
            self._lost_steps.inc(float(lost_steps), self._tags)
