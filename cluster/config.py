"""Configuration of a run on a cluster: the training configuration plus where and on how much it runs."""

from typing import Self

from pydantic import Field, model_validator

from trainer.config import Config, TrainConfig


class WorkersConfig(Config):
    """Size of the training group."""

    min: int = Field(1, gt=0)
    """Fewest workers with which the run goes on."""
    max: int = Field(1, gt=0)
    """Most workers used."""
    gpus: int = Field(0, ge=0)
    """GPUs per worker: 1 on a GPU cluster, 0 on CPU."""
    cpus: float = Field(1, gt=0)
    """CPU cores reserved per worker."""


class RestartConfig(Config):
    """How often a run is restarted by itself."""

    max_failures: int = Field(8, ge=0)
    """Restarts after infrastructure failures."""
    max_preemptions: int = Field(1000, ge=0)
    """Restarts after preemptions."""
    max_failures_at_same_step: int = Field(3, gt=0)
    """Failures without a step of progress before the run stops."""
    backoff_seconds: float = Field(2.0, ge=0)
    """First pause before a restart; it doubles up to a minute."""


class ClusterConfig(Config):
    """Where a run runs."""

    address: str | None = None
    """Ray address or dashboard URL; none: RAY_ADDRESS, else an embedded Ray on this machine."""
    workers: WorkersConfig = WorkersConfig()
    """Training group."""
    reader_cpus: float = Field(1, gt=0)
    """CPU cores reserved per reader actor."""
    restart: RestartConfig = RestartConfig()
    """Restart budget."""
    stop_grace_seconds: float = Field(120.0, gt=0)
    """Time for a last checkpoint after a stop request or a drain notice."""
    secrets: tuple[str, ...] = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    """Names of environment variables passed to the job; their values are never stored or printed."""


class JobConfig(TrainConfig):
    """The whole content of a recipe file."""

    cluster: ClusterConfig = ClusterConfig()
    """Where the run runs."""

    @property
    def world_sizes(self) -> tuple[int, ...]:
        """World sizes the run may use, smallest first: between min and max, dividing the lanes."""
        workers = self.cluster.workers
        return tuple(size for size in range(workers.min, workers.max + 1) if self.data.lanes % size == 0)

    @model_validator(mode="after")
    def _check_world_sizes(self) -> Self:
        workers = self.cluster.workers
        if workers.min > workers.max:
            raise ValueError(f"cluster.workers: min = {workers.min} exceeds max = {workers.max}; raise max")
        if not self.world_sizes:
            raise ValueError(
                f"cluster.workers: no world size from {workers.min} to {workers.max} divides "
                f"data.lanes = {self.data.lanes}; change either"
            )
        return self
