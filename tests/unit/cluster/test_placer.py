"""The placer takes the largest group that fits, waits for nodes on their way, and asks an autoscaler for the rest."""

import pytest

from isthmus.cluster.errors import ClusterError
from isthmus.cluster.ray_nodes.nodes import Node
from isthmus.cluster.supervision import placer as module
from isthmus.cluster.supervision.placer import GroupPlacer
from tests.unit.cluster.configs import job_config

pytestmark = pytest.mark.unit
GPU_NODE = {"CPU": 8.0, "GPU": 8.0}


class Group:
    """A placed group, as far as the placer looks at it; `num_slots` of it are left after an attempt."""

    def __init__(self, world_size, num_slots=None, free=100):
        self.world_size, self.num_slots = world_size, num_slots or world_size
        self.free = free

    def renew(self, _config, _spares, world_size, _excluded, _patience):
        added = max(0, world_size - self.num_slots)
        return {"kept": world_size - added, "new": added} if added <= self.free else None


class Cluster:
    """Stands in for Ray and for the module `time`; a node arrives every `arrival_seconds`, up to `arriving` of them."""

    def __init__(self, nodes=(), arrival_seconds=30.0, arriving=0):
        self.now, self.nodes, self.patience, self.asked, self.met = 0.0, list(nodes), [], [], False
        self._arrival_seconds, self._arriving = arrival_seconds, arriving

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def live_nodes(self, _excluded=()):
        arrived = min(self._arriving, int(self.now / self._arrival_seconds))
        nodes = [*self.nodes, *[(GPU_NODE, GPU_NODE)] * arrived]
        return [Node(f"n{number}", "", total, free) for number, (total, free) in enumerate(nodes)]

    def known_nodes(self):
        return {node.id for node in self.live_nodes()}

    def place(self, _config, size, _excluded, patience):
        self.patience.append((size, patience))
        return Group(size)

    def request(self):
        """Return what stands in for a NodeRequest."""
        cluster = self

        class Request:
            def ask(self, *groups):
                cluster.asked = [len(bundles) for bundles in groups if bundles]

            def withdraw(self):
                cluster.asked = []

            def withdraw_if_met(self):
                met, cluster.met = cluster.met, False
                return met

        return Request()


@pytest.fixture
def placer(monkeypatch):
    def make(cluster, *, data=None, **cluster_config):
        monkeypatch.setattr(module, "time", cluster)
        monkeypatch.setattr(module, "live_nodes", cluster.live_nodes)
        monkeypatch.setattr(module, "known_nodes", cluster.known_nodes)
        monkeypatch.setattr(module, "NodeRequest", cluster.request)
        monkeypatch.setattr(module, "WorkerGroup", cluster)
        workers = {"min": 8, "max": 32, "gpus": 1}
        data = {"sources": [{"manifest": "s3://b/m"}], "lanes": 32} | (data or {})
        stage = {"steps": 4, "global_batch_size": 32, "micro_batch_size": 1, "deepspeed": "zero1"}
        return GroupPlacer(job_config(data=data, stage1=stage, cluster={"workers": workers, **cluster_config}))

    return make


def place(placer):
    return placer.place(frozenset(), lambda _message: None, lambda: False)


def test_nodes_that_arrive_one_by_one_are_waited_for_as_long_as_the_configuration_says(placer):
    at_once = Cluster(arriving=4)
    assert place(placer(at_once)).world_size == 8
    patient = Cluster(arriving=4)
    assert place(placer(patient, start_wait_seconds=300)).world_size == 32
    assert patient.now < 130
    in_vain = Cluster(arriving=2)
    assert place(placer(in_vain, start_wait_seconds=300)).world_size == 16


def test_patience_grows_with_the_size_of_the_group(placer):
    cluster = Cluster([(GPU_NODE, GPU_NODE)] * 4)
    place(placer(cluster))
    size, patience = cluster.patience[0]
    assert size == 32
    assert patience > module.FIRST_PATIENCE_SECONDS + 0.5


def test_an_autoscaler_is_asked_for_what_is_missing_and_for_nothing_at_the_end(placer):
    cluster = Cluster([(GPU_NODE, GPU_NODE)])
    of_run = placer(cluster, data={"backend": "ray", "readers": 1}, wait_seconds=10)
    with pytest.raises(ClusterError, match="no resources for 10 s"):
        place(of_run)  # 8 workers leave no CPU for their 8 readers
    assert cluster.asked == [8 + 8, 24 + 24]
    cluster.nodes.append(({"CPU": 64.0}, {"CPU": 64.0}))
    assert place(of_run).world_size == 8
    assert cluster.asked == [24 + 24]
    cluster.nodes += [(GPU_NODE, GPU_NODE)] * 3
    assert place(of_run).world_size == 32
    assert cluster.asked == []
    place(of_run)
    of_run.close()
    assert cluster.asked == []


def test_a_run_grows_although_its_own_readers_fill_the_nodes_for_them(placer):
    full_gpu = ({"CPU": 8.0, "GPU": 8.0}, {"CPU": 0.0, "GPU": 0.0})
    full_cpu = ({"CPU": 16.0}, {"CPU": 0.0})
    cluster = Cluster([full_gpu, (GPU_NODE, GPU_NODE), full_cpu])
    of_run = placer(cluster, data={"backend": "ray", "readers": 16})
    found = []
    for _ in range(4):
        cluster.now += 10
        found.append(of_run.can_grow(Group(8), frozenset()))
    assert found == [False, True, True, True], "two checks in a row"


def test_a_request_that_is_met_is_room_to_grow_while_the_figures_are_old(placer):
    full = ({"CPU": 8.0, "GPU": 8.0}, {"CPU": 0.0, "GPU": 0.0})
    cluster = Cluster([full])
    of_run = placer(cluster)
    cluster.now += 10
    assert not of_run.can_grow(Group(8), frozenset())
    assert cluster.asked == [24]
    cluster.met, cluster.asked = True, []
    cluster.nodes += [full] * 3  # the request holds them
    cluster.now += 10
    assert not of_run.can_grow(Group(8), frozenset())
    assert cluster.asked == [], "asked again, it would hold them again"
    cluster.nodes[1:] = [(GPU_NODE, GPU_NODE)] * 3
    cluster.now += 10
    assert of_run.can_grow(Group(8), frozenset())


def test_the_largest_group_does_not_grow(placer):
    cluster = Cluster([(GPU_NODE, GPU_NODE)] * 9)
    of_run = placer(cluster)
    cluster.now += 10
    assert not any(of_run.can_grow(Group(32), frozenset()) for _ in range(3))


@pytest.mark.parametrize(
    ("num_nodes", "free", "processes"),
    [
        (4, 100, {"kept": 24, "new": 8}),  # another node stands by
        (4, 0, {"kept": 16, "new": 0}),  # and has just been taken by another run
        (3, 100, {"kept": 16, "new": 0}),
    ],
)
def test_what_a_lost_node_left_is_completed_to_the_largest_size(placer, num_nodes, free, processes):
    full = ({"CPU": 8.0, "GPU": 8.0}, {"CPU": 0.0, "GPU": 0.0})
    nodes = [full] * 3 + [(GPU_NODE, GPU_NODE)] * (num_nodes - 3)
    assert placer(Cluster(nodes)).renew(Group(32, num_slots=24, free=free), None, frozenset()) == processes


def test_a_rest_that_is_too_small_or_not_wanted_is_given_up(placer):
    cluster = Cluster([])
    assert placer(cluster).renew(Group(32, num_slots=4), None, frozenset()) is None
    assert placer(cluster, start_wait_seconds=300).renew(Group(32, num_slots=24), None, frozenset()) is None
