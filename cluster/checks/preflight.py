"""Checks before GPU hours are spent: nodes, network between workers, object store, frozen weights, data, versions.

`python -m isthmus.cluster.checks.preflight config.yaml` runs them inside a Ray job and prints one line of JSON.
"""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import ParamSpec, TypeVar

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from isthmus.cluster.checks.node_facts import NodeFacts, gather
from isthmus.cluster.checks.store_checks import StoreSpeed, check_data, check_store, check_weights
from isthmus.cluster.config import JobConfig
from isthmus.cluster.embedded import NICENESS_VARIABLE, embedded_ray
from isthmus.cluster.errors import last_line
from isthmus.cluster.ray_nodes.auth import use_tokens
from isthmus.cluster.ray_nodes.nodes import Node, live_nodes
from isthmus.cluster.submission.jobs import Jobs
from isthmus.cluster.supervision.group import PlacementError, WorkerGroup
from isthmus.cluster.supervision.resource_request import ResourceRequest, largest_world_size, shortfall
from isthmus.data_pipeline.errors import DataError
from isthmus.trainer.config.loading import load_config

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
MARK = "isthmus-preflight: "
"""Before the line of JSON in the job's log."""
MODULE = "isthmus.cluster.checks.preflight"
NODES_AT_ONCE = 64
TASK_TIMEOUT_SECONDS = 60.0
GROUP_TIMEOUT_SECONDS = 90.0
MAX_SKEW_SECONDS = 2.0
MIN_FREE_MEMORY_BYTES = 1 << 30
MIN_FREE_DISK_BYTES = 2 << 30
GIGA = 1e9


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    where: str
    ok: bool
    found: str
    remedy: str = ""


def run_checks(config: JobConfig) -> list[Check]:
    """Run all checks on the connected cluster; a check that cannot run is a failed one."""
    nodes = live_nodes()
    here = gather(config.cluster.secrets, config.data.cache_dir)
    checks = [_check_size(config, nodes)]
    with ThreadPoolExecutor(NODES_AT_ONCE) as pool:
        for found in pool.map(lambda node: _check_node(config, node, here), nodes):
            checks += found
        checks += pool.map(lambda node: _check_store_from(config, node), nodes)
    checks += [
        _guarded("frozen weights", "driver", lambda: check_weights(config), "check model.*.path and its permissions"),
        _guarded("data", "driver", lambda: check_data(config), "run `isthmus data index` and check data.sources"),
        _check_all_reduce(config, nodes),
    ]
    return checks


def run_on_embedded_ray(config: JobConfig) -> list[Check]:
    """Run all checks on a Ray of our own on this machine, which is ended afterwards."""
    with embedded_ray(config):
        return run_checks(config)


def run_as_job(config: JobConfig, address: str) -> list[Check]:
    """Run all checks as a job of a cluster.

    Raises:
        ClusterError: the cluster cannot be reached, or the job gave no answer.
    """
    for line in Jobs(address).run_to_end(config, MODULE):
        if line.startswith(MARK):
            return [Check(**fields) for fields in json.loads(line.removeprefix(MARK))]
    raise AssertionError("run_to_end raises if the job gives no result")


def _check_size(config: JobConfig, nodes: list[Node]) -> Check:
    request = ResourceRequest.of(config)
    size = largest_world_size(config.world_sizes, request, [node.free for node in nodes])
    if size is None:
        found = shortfall(min(config.world_sizes), request, [n.free for n in nodes], [n.total for n in nodes])
        return Check("world size", "cluster", ok=False, found=found, remedy="add nodes, or lower cluster.workers")
    return Check(
        "world size", "cluster", ok=True, found=f"{size} of {', '.join(map(str, config.world_sizes))} fits now"
    )


def _check_node(config: JobConfig, node: Node, here: NodeFacts) -> list[Check]:
    """Return the checks of one node; versions are compared with those of the driver's."""
    began = time.time()
    try:
        facts = _on_node(node, gather, config.cluster.secrets, config.data.cache_dir)
    except (RayError, TimeoutError) as error:
        return [Check("node", node.address, ok=False, found=last_line(error), remedy="check the node, or remove it")]
    return list(_judge(config, node, facts, here, skew_seconds=_skew(facts, began, time.time())))


def _judge(config: JobConfig, node: Node, facts: NodeFacts, here: NodeFacts, *, skew_seconds: float) -> Iterator[Check]:
    where = f"{facts.host} {node.address}"
    promised = int(node.total.get("GPU", 0))
    if config.cluster.workers.gpus or promised:
        ok = len(facts.gpus) == promised and not any("failed" in gpu for gpu in facts.gpus)
        found = f"Ray counts {promised}, nvidia-smi {len(facts.gpus)}: {'; '.join(sorted(set(facts.gpus))) or 'none'}"
        yield Check("GPUs", where, ok, found, "" if ok else "check driver and container toolkit on this node")
    ok = facts.free_memory_bytes >= MIN_FREE_MEMORY_BYTES
    found = f"{facts.free_memory_bytes / GIGA:.1f} GB free of {facts.memory_bytes / GIGA:.1f} GB"
    yield Check("memory", where, ok, found, "" if ok else "end other processes, or use a larger node")
    need = max(MIN_FREE_DISK_BYTES, config.data.cache_bytes if config.data.cache_dir else 0)
    ok = facts.free_disk_bytes >= need
    remedy = "" if ok else f"free {need / GIGA:.0f} GB, or lower data.cache_bytes"
    yield Check("disk", where, ok, f"{facts.free_disk_bytes / GIGA:.1f} GB free", remedy)
    ok = abs(skew_seconds) <= MAX_SKEW_SECONDS
    yield Check(
        "clock", where, ok, f"{skew_seconds:+.2f} s", "" if ok else "run NTP: leases and signatures need the time"
    )
    niced = facts.niceness > 0
    remedy = f"start Ray with {NICENESS_VARIABLE}=0 if the node has other work" if niced else ""
    yield Check("priority", where, ok=True, found=f"workers run at nice {facts.niceness}", remedy=remedy)
    other = {name: found for name, found in facts.versions.items() if found != here.versions[name]}
    described = ", ".join(f"{name} {found} here {here.versions[name]}" for name, found in other.items())
    yield Check("versions", where, not other, described or "equal", "use one image for all nodes" if other else "")
    missing = sorted(set(here.environment) - set(facts.environment))
    remedy = f"set {', '.join(missing)} on the node (Kubernetes: cluster.kubernetes.secret)" if missing else ""
    yield Check("secrets", where, not missing, f"{len(facts.environment)} of {len(here.environment)} set", remedy)


def _check_store_from(config: JobConfig, node: Node) -> Check:
    """Return the object store's check from one node, while the others make theirs, as in training."""
    try:
        speed: StoreSpeed = _on_node(node, check_store, config)
    except (RayError, DataError, OSError, TimeoutError) as error:
        remedy = "check store.endpoint_url, credentials and the policy (docs/operators.md)"
        return Check("object store", node.address, ok=False, found=last_line(error), remedy=remedy)
    found = f"write {speed.write_megabytes_per_second:.0f} MB/s, read {speed.read_megabytes_per_second:.0f} MB/s"
    return Check("object store", node.address, ok=True, found=f"{found}, conditional writes hold")


def _check_all_reduce(config: JobConfig, nodes: list[Node]) -> Check:
    """Run an all-reduce over the largest group that fits now."""
    size = largest_world_size(config.world_sizes, ResourceRequest.of(config), [node.free for node in nodes])
    if size is None:
        return Check("all-reduce", "workers", ok=False, found="not run: no group fits", remedy="see world size")
    remedy = "check firewalls, NCCL_SOCKET_IFNAME, GPU health (NCCL_DEBUG=INFO)"
    try:
        group = WorkerGroup.place(config, size, (), TASK_TIMEOUT_SECONDS)
    except PlacementError as error:
        return Check("all-reduce", "workers", ok=False, found=str(error), remedy=remedy)
    if group is None:
        return Check(
            "all-reduce", "workers", ok=False, found="the group could not be reserved", remedy="see world size"
        )
    try:
        return _reduce_in(group, config, remedy)
    finally:
        group.kill()


def _reduce_in(group: WorkerGroup, config: JobConfig, remedy: str) -> Check:
    where = f"{group.world_size} workers on {len(group.node_ids)} nodes"
    group.launch(config, config.stages[0], None, "isthmus.cluster.workers.allreduce")
    deadline = time.monotonic() + GROUP_TIMEOUT_SECONDS
    while any(member.result is None for member in group.members) and time.monotonic() < deadline:
        group.update(0.5)
    ends = [member.result for member in group.members]
    failure = next((end.failure for end in ends if end and end.failure), None)
    if failure or None in ends:
        found = str(failure) if failure else f"no answer within {GROUP_TIMEOUT_SECONDS:g} s"
        return Check("all-reduce", where, ok=False, found=found, remedy=remedy)
    answers = [json.loads(end.outcome) for end in ends if end and end.outcome]
    correct = all(answer["correct"] for answer in answers)
    slowest = min(answer["gigabytes_per_second"] for answer in answers)
    found = f"{answers[0]['backend']}: sum {'right' if correct else 'WRONG'}, {slowest:.2f} GB/s"
    return Check("all-reduce", where, correct, found, "" if correct else remedy)


def _on_node(node: Node, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a function on a node and return its value, within a limit."""
    strategy = NodeAffinitySchedulingStrategy(node.id, soft=False)
    task = ray.remote(function).options(num_cpus=0, max_retries=0, scheduling_strategy=strategy)
    answer: T = ray.get(task.remote(*args, **kwargs), timeout=TASK_TIMEOUT_SECONDS)
    return answer


def _skew(facts: NodeFacts, began: float, ended: float) -> float:
    """Return how far a node's clock is ahead, as far as the call's duration lets us know."""
    if began <= facts.unix_seconds <= ended:
        return 0.0
    return facts.unix_seconds - (ended if facts.unix_seconds > ended else began)


def _guarded(name: str, where: str, check: Callable[[], str], remedy: str) -> Check:
    try:
        return Check(name, where, ok=True, found=check())
    except (DataError, OSError, ValueError) as error:
        return Check(name, where, ok=False, found=last_line(error), remedy=remedy)


def main(path: str) -> int:
    """Run the checks in a Ray job and print them as one line of JSON; return 0 when all hold."""
    use_tokens(create=False)
    config = load_config(path, [], JobConfig)
    ray.init(address="auto", namespace=f"preflight-{config.run.name}", logging_level=logging.WARNING)
    checks = run_checks(config)
    sys.stdout.write(MARK + json.dumps([asdict(check) for check in checks]) + "\n")
    return 0 if all(check.ok for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
