"""Configuration of a run on a cluster: the training configuration plus where and on how much it runs."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from isthmus.data_pipeline.config import Config
from isthmus.trainer.config.schema import TrainConfig

EnvironmentName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class WorkersConfig(Config):
    """Size of the training group."""

    min: int = Field(1, gt=0)
    """Fewest workers with which the run trains."""
    max: int = Field(1, gt=0)
    """Most workers used."""
    gpus: int = Field(0, ge=0)
    """GPUs per worker: 1 on a GPU cluster, 0 on CPU."""
    cpus: float = Field(1, gt=0)
    """CPU cores reserved per worker."""


class RestartConfig(Config):
    """When a run that keeps failing stops; a run that commits checkpoints is restarted as often as necessary."""

    max_failures: int = Field(8, ge=0)
    """Infrastructure failures to retry within `window_seconds` without a checkpoint committed in between."""
    max_preemptions: int = Field(1000, ge=0)
    """Preemptions to retry within `window_seconds` without a checkpoint committed in between."""
    window_seconds: float = Field(6 * 3600.0, gt=0)
    """Older failures are no longer counted."""
    max_failures_at_same_step: int = Field(3, gt=0)
    """Failures of the same rank at the same step before the run stops."""
    backoff_seconds: float = Field(2.0, ge=0)
    """First pause before a restart; it doubles up to a minute."""


class NodeConfig(Config):
    """Resources of the pods of one group; one pod is one Ray node."""

    cpus: int = Field(gt=0)
    """CPU cores."""
    memory: str = Field(pattern=r"^[1-9][0-9]*(Mi|Gi)$")
    """Memory, such as 64Gi."""
    gpus: int = Field(0, ge=0)
    """GPUs."""
    selector: dict[str, str] = Field({})
    """Node labels that these pods require, such as {cloud.google.com/gke-spot: "true"}."""
    tolerations: tuple[str, ...] = ()
    """Keys of the taints that these pods tolerate."""


class KubernetesConfig(Config):
    """How `isthmus manifests` renders a run for KubeRay and Kueue."""

    image: str = "isthmus:0.1.0"
    """Image built from the Dockerfile, with registry and tag."""
    namespace: str = "default"
    """Namespace of all objects."""
    service_account: str | None = None
    """Service account with access to the object store (IRSA, workload identity)."""
    secret: str | None = None
    """Secret whose keys become environment variables, such as AWS_ACCESS_KEY_ID."""
    queue: str | None = None
    """Kueue LocalQueue in which the run waits; None means no queue."""
    head: NodeConfig = NodeConfig(cpus=4, memory="16Gi")
    """Head: an on-demand machine that runs only the driver."""
    workers: NodeConfig = NodeConfig(cpus=32, memory="256Gi", gpus=8, tolerations=("nvidia.com/gpu", "spot"))
    """GPU group, suitable for spot machines."""
    readers: NodeConfig = NodeConfig(cpus=16, memory="64Gi")
    """CPU group of the readers."""
    ttl_seconds: int = Field(600, ge=0)
    """Time before the pods of a finished RayJob are deleted."""
    backoff_limit: int = Field(20, ge=0)
    """How often KubeRay recreates the cluster after the head or the driver is lost; user errors are not retried."""


class ClusterConfig(Config):
    """The cluster and the resources of a run."""

    address: str | None = None
    """Dashboard for `isthmus submit` and `preflight`, such as http://HOST:8265; None means
    RAY_API_SERVER_ADDRESS, else RAY_ADDRESS."""
    workers: WorkersConfig = WorkersConfig()
    """Training group."""
    restart: RestartConfig = RestartConfig()
    """Restart budget."""
    spares: int = Field(0, ge=0)
    """Warm processes per node that replace lost workers; each needs 0.5 GB of host memory and no GPU."""
    wait_seconds: float = Field(3600.0, gt=0)
    """A run fails if it finds no free resources, or the object store does not respond, for this long."""
    start_wait_seconds: float = Field(0.0, ge=0)
    """Time to wait for the largest group before starting a smaller one, for clusters whose nodes arrive slowly."""
    start_timeout_seconds: float = Field(120.0, gt=0)
    """Time limit for starting the processes of a group, plus 0.1 s per process."""
    grow_after_seconds: float = Field(60.0, ge=0)
    """An attempt runs at least this long before it is restarted with more workers."""
    unresponsive_seconds: float = Field(60.0, gt=0)
    """A worker that does not respond to the driver for this long counts as lost."""
    stop_grace_seconds: float = Field(120.0, gt=0)
    """Time limit for a last checkpoint after a stop request or a drain notice."""
    export_timeout_seconds: float = Field(3600.0, gt=0)
    """Time limit for the export at the end of a run, including the wait for a free node."""
    secrets: tuple[str, ...] = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    """Names of environment variables that the nodes must provide; values are never sent, stored or printed."""
    environment: dict[EnvironmentName, str] = Field({})
    """Variables for driver, workers and readers, such as NCCL_SOCKET_IFNAME. Stored with the run: no secrets."""
    kubernetes: KubernetesConfig = KubernetesConfig()
    """Kubernetes manifests."""

    @model_validator(mode="after")
    def _check_environment(self) -> Self:
        if secret := sorted(self.environment.keys() & set(self.secrets)):
            raise ValueError(
                f"cluster.environment: {', '.join(secret)} would be stored with the run; "
                "set it on the nodes, cluster.secrets only names it"
            )
        return self


class JobConfig(TrainConfig):
    """The whole content of a recipe file."""

    cluster: ClusterConfig = ClusterConfig()
    """Cluster and resources."""

    @property
    def world_sizes(self) -> tuple[int, ...]:
        """World sizes the run may use, smallest first: between min and max, dividing virtual ranks or lanes."""
        workers = self.cluster.workers
        parts = self.run.virtual_ranks or self.data.lanes
        return tuple(size for size in range(workers.min, workers.max + 1) if parts % size == 0)

    @model_validator(mode="after")
    def _check_world_sizes(self) -> Self:
        workers = self.cluster.workers
        if workers.min > workers.max:
            raise ValueError(f"cluster.workers: min = {workers.min} exceeds max = {workers.max}; raise max")
        if not self.world_sizes:
            virtual, lanes = self.run.virtual_ranks, self.data.lanes
            parts = f"run.virtual_ranks = {virtual}" if virtual else f"data.lanes = {lanes}"
            raise ValueError(
                f"cluster.workers: no world size from {workers.min} to {workers.max} divides {parts}; change either"
            )
        return self
