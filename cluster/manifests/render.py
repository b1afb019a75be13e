"""Kubernetes manifests of a run: KubeRay's RayJob or RayCluster, the Kueue queue, rendered from the configuration.

The parts that are the same for every run are in the *.yaml files next to this one; the rest is added here.
"""

import json
import math
from pathlib import Path
from typing import Any

import ray
import yaml

from isthmus.cluster.config import JobConfig, NodeConfig
from isthmus.cluster.embedded import NICENESS_VARIABLE
from isthmus.cluster.ray_nodes.jobs_api import NO_RETRY_VARIABLE
from isthmus.cluster.submission import secret_names
from isthmus.cluster.submission.job import job_environment, job_metadata
from isthmus.cluster.supervision.resource_request import ResourceRequest
from isthmus.trainer.config.loading import to_yaml

FOLDER = Path(__file__).parent
CONFIG_MOUNT = "/etc/isthmus"
RUN_LABEL = "app.kubernetes.io/instance"
RAY_RESOURCES = ("CPU", "GPU", "memory", "object_store_memory")
"""Resources that Ray finds by itself; others are given to `ray start`."""
GRACE_MARGIN_SECONDS = 30
CACHE_MARGIN = 1.1
"""Files that are being written, and the file system's own overhead."""
OBJECT_STORE_SHARE = 0.3
"""Part of a pod's memory for /dev/shm, as Ray's own default."""

Manifest = dict[str, Any]


def render(config: JobConfig) -> list[Manifest]:
    """Return the manifests of a run in the order in which they are applied."""
    return [*queue(config), network_policy(config), config_map(config), ray_job(config)]


def ray_cluster(config: JobConfig) -> Manifest:
    """Return a RayCluster for `isthmus submit`: on-demand head without work, spot GPU group, CPU reader group."""
    manifest = _template("raycluster.yaml")[0]
    manifest["metadata"] |= {"name": config.run.name, "namespace": config.cluster.kubernetes.namespace}
    manifest["spec"] = _cluster_spec(config, manifest["spec"])
    return manifest


def ray_job(config: JobConfig) -> Manifest:
    """Return a RayJob that makes the cluster, runs the driver on its head and takes the cluster down at the end."""
    kubernetes = config.cluster.kubernetes
    environment = {**job_environment(config), NO_RETRY_VARIABLE: "1"}
    del environment[secret_names.VARIABLE]  # this machine's variables are not the pods'
    manifest = _template("rayjob.yaml")[0]
    manifest["metadata"] |= {"name": config.run.name, "namespace": kubernetes.namespace}
    if kubernetes.queue:
        manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = kubernetes.queue
    manifest["spec"] |= {
        "entrypoint": f"exec python -m isthmus.cluster.driver {CONFIG_MOUNT}/config.yaml",
        "runtimeEnvYAML": yaml.safe_dump({"env_vars": environment}),
        "metadata": job_metadata(config),
        "ttlSecondsAfterFinished": kubernetes.ttl_seconds,
        "backoffLimit": kubernetes.backoff_limit,
        "suspend": bool(kubernetes.queue),
        "rayClusterSpec": _cluster_spec(config, _template("raycluster.yaml")[0]["spec"]),
    }
    _mount_config(config, manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"])
    if kubernetes.queue:
        _fix_size(manifest["spec"]["rayClusterSpec"])
    return manifest


def network_policy(config: JobConfig) -> Manifest:
    """Return a NetworkPolicy that lets only the run's own pods reach each other's ports."""
    manifest = _template("networkpolicy.yaml")[0]
    manifest["metadata"] |= {"name": config.run.name, "namespace": config.cluster.kubernetes.namespace}
    own_pods = {"matchLabels": {RUN_LABEL: config.run.name}}
    manifest["spec"]["podSelector"] = own_pods
    manifest["spec"]["ingress"][0]["from"] = [{"podSelector": own_pods}]
    return _unshared(manifest)  # type: ignore[no-any-return]


def queue(config: JobConfig) -> list[Manifest]:
    """Return Kueue's flavour, cluster queue and local queue with a quota of one run; empty without a queue."""
    kubernetes = config.cluster.kubernetes
    if not kubernetes.queue:
        return []
    flavor, cluster_queue, local_queue = _template("kueue.yaml")
    local_queue["metadata"] = {"name": kubernetes.queue, "namespace": kubernetes.namespace}
    groups = [
        (kubernetes.head, 1),
        (kubernetes.workers, num_worker_pods(config)),
        (kubernetes.readers, num_reader_pods(config)),
    ]
    quota: dict[str, Any] = {
        "cpu": sum(node.cpus * count for node, count in groups),
        "memory": f"{sum(_mebibytes(node) * count for node, count in groups)}Mi",
        "nvidia.com/gpu": sum(node.gpus * count for node, count in groups),
    }
    if cache := _cache_mebibytes(config):
        pods = num_reader_pods(config) if config.data.backend == "ray" else num_worker_pods(config)
        quota["ephemeral-storage"] = f"{cache * pods}Mi"
    cluster_queue["spec"]["resourceGroups"][0]["coveredResources"] = list(quota)
    resources = [{"name": name, "nominalQuota": amount} for name, amount in quota.items()]
    cluster_queue["spec"]["resourceGroups"][0]["flavors"][0]["resources"] = resources
    return [flavor, cluster_queue, local_queue]


def config_map(config: JobConfig) -> Manifest:
    """Return the ConfigMap that holds the resolved configuration, which contains no secrets."""
    metadata = {"name": f"{config.run.name}-config", "namespace": config.cluster.kubernetes.namespace}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"config.yaml": to_yaml(config)}}


def num_worker_pods(config: JobConfig, num_workers: int | None = None) -> int:
    """Return how many pods of the GPU group hold this many workers (all: the largest world size)."""
    pod, workers = config.cluster.kubernetes.workers, config.cluster.workers
    fits = [int(pod.cpus // workers.cpus)] + ([pod.gpus // workers.gpus] if workers.gpus else [])
    return math.ceil((num_workers or max(config.world_sizes)) / max(1, min(fits)))


def num_reader_pods(config: JobConfig) -> int:
    """Return how many pods of the reader group hold all readers."""
    return math.ceil(ResourceRequest.of(config).num_readers(max(config.world_sizes)) / _readers_per_pod(config))


def _readers_per_pod(config: JobConfig) -> int:
    cpus_per_reader = max(1.0, ResourceRequest.of(config).reader.get("CPU", 0.0))
    return max(1, int(config.cluster.kubernetes.readers.cpus // cpus_per_reader))


def _reader_resources(config: JobConfig) -> dict[str, str]:
    """Return `ray start` parameters that give a reader pod what its readers ask for under names of their own."""
    readers = _readers_per_pod(config)
    wanted = ResourceRequest.of(config).reader
    custom = {name: math.ceil(amount * readers) for name, amount in wanted.items() if name not in RAY_RESOURCES}
    return {"resources": json.dumps(json.dumps(custom))} if custom else {}


def _cluster_spec(config: JobConfig, spec: Manifest) -> Manifest:
    kubernetes = config.cluster.kubernetes
    spec["rayVersion"] = ray.__version__
    head = spec["headGroupSpec"]["template"]
    _fill_pod(config, head, kubernetes.head)
    gpu, readers = spec["workerGroupSpecs"]
    smallest, largest = num_worker_pods(config, min(config.world_sizes)), num_worker_pods(config)
    gpu |= {"replicas": largest, "minReplicas": smallest, "maxReplicas": largest}
    count = num_reader_pods(config)
    readers |= {"replicas": count, "minReplicas": min(count, 1), "maxReplicas": count}
    readers["rayStartParams"] = _reader_resources(config)
    for group, node in ((gpu, kubernetes.workers), (readers, kubernetes.readers)):
        _fill_pod(config, group["template"], node)
        volume = group["template"]["spec"]["volumes"][0]["emptyDir"]
        volume["sizeLimit"] = f"{int(_mebibytes(node) * OBJECT_STORE_SHARE)}Mi"
    _mount_cache(config, (readers if config.data.backend == "ray" else gpu)["template"])
    return spec


def _fix_size(spec: Manifest) -> None:
    """Remove the autoscaler: Kueue admits a job as a whole and refuses one that would change its own size."""
    spec["enableInTreeAutoscaling"] = False
    del spec["autoscalerOptions"]


def _fill_pod(config: JobConfig, template: Manifest, node: NodeConfig) -> None:
    """Write image, resources, environment and placement into a pod template."""
    kubernetes = config.cluster.kubernetes
    template["metadata"]["labels"] = {RUN_LABEL: config.run.name}
    container = template["spec"]["containers"][0]
    amounts: dict[str, str] = {"cpu": str(node.cpus), "memory": node.memory}
    if node.gpus:
        amounts["nvidia.com/gpu"] = str(node.gpus)
    template["spec"]["terminationGracePeriodSeconds"] = _grace_seconds(config) + GRACE_MARGIN_SECONDS
    container["image"] = kubernetes.image
    container["resources"] = {"requests": dict(amounts), "limits": dict(amounts)}
    container["env"] = [
        {"name": "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "value": str(_grace_seconds(config))},
        {"name": NICENESS_VARIABLE, "value": "0"},
        {"name": "ISTHMUS_STOP_GRACE_SECONDS", "value": str(int(config.cluster.stop_grace_seconds))},
    ]
    if kubernetes.secret:
        container["envFrom"] = [{"secretRef": {"name": kubernetes.secret}}]
    if kubernetes.service_account:
        template["spec"]["serviceAccountName"] = kubernetes.service_account
    if node.selector:
        template["spec"]["nodeSelector"] = dict(node.selector)
    if node.tolerations:
        template["spec"]["tolerations"] = [{"key": key, "operator": "Exists"} for key in node.tolerations]


def _mount_config(config: JobConfig, head: Manifest) -> None:
    head["spec"]["containers"][0]["volumeMounts"] = [{"name": "config", "mountPath": CONFIG_MOUNT, "readOnly": True}]
    head["spec"]["volumes"] = [{"name": "config", "configMap": {"name": f"{config.run.name}-config"}}]


def _mount_cache(config: JobConfig, template: Manifest) -> None:
    """Give the pods in which readers run a volume for the chunk cache, and reserve the machine's disk for it."""
    mebibytes = _cache_mebibytes(config)
    if not mebibytes:
        return
    size = f"{mebibytes}Mi"
    container = template["spec"]["containers"][0]
    container["volumeMounts"].append({"name": "cache", "mountPath": config.data.cache_dir})
    container["resources"]["requests"]["ephemeral-storage"] = size
    template["spec"]["volumes"].append({"name": "cache", "emptyDir": {"sizeLimit": size}})


def _cache_mebibytes(config: JobConfig) -> int:
    """Return the size of a pod's cache volume; 0: no cache. The kubelet evicts a pod that exceeds it."""
    if not config.data.cache_dir or not config.data.cache_bytes:
        return 0
    return math.ceil(config.data.cache_bytes / (1 << 20) * CACHE_MARGIN)


def _grace_seconds(config: JobConfig) -> int:
    return math.ceil(config.cluster.stop_grace_seconds)


def _mebibytes(node: NodeConfig) -> int:
    return int(node.memory[:-2]) * (1024 if node.memory.endswith("Gi") else 1)


def _template(name: str) -> list[Manifest]:
    """Return the documents of a template; each is a copy without shared parts."""
    return [_unshared(document) for document in yaml.safe_load_all((FOLDER / name).read_text())]


def _unshared(value: Any) -> Any:
    """Return nested data in which no two places share a mapping or list, as YAML anchors make them."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value
