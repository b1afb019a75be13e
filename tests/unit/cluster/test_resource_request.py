"""World sizes are chosen from what fits on the nodes, readers included."""

import pytest

from isthmus.cluster.supervision.resource_request import ResourceRequest, largest_world_size, shortfall

from .configs import job_config

pytestmark = pytest.mark.unit
GPU = ResourceRequest({"CPU": 4, "GPU": 1}, {}, 0)
SIZES = (1, 2, 4, 8)


@pytest.mark.parametrize(
    ("nodes", "size"),
    [
        ([{"CPU": 32, "GPU": 8}], 8),
        ([{"CPU": 32, "GPU": 7}], 4),
        ([{"CPU": 31, "GPU": 8}], 4),
        ([{"CPU": 4, "GPU": 1}, {"CPU": 4, "GPU": 1}, {"CPU": 64}], 2),
        ([{"CPU": 64}], None),
        ([], None),
    ],
)
def test_largest_size_that_fits(nodes, size):
    assert largest_world_size(SIZES, GPU, nodes) == size


def test_a_worker_cannot_be_split_over_two_nodes():
    assert largest_world_size((1,), GPU, [{"CPU": 2, "GPU": 1}, {"CPU": 2}]) is None


def test_readers_take_cpu_nodes_first():
    request = ResourceRequest({"CPU": 4, "GPU": 1}, {"CPU": 1}, 8)
    nodes = [{"CPU": 8, "GPU": 2}, {"CPU": 8}]
    assert largest_world_size((1, 2), request, nodes) == 2
    assert largest_world_size((1, 2), request, nodes[:1]) is None  # 4 CPUs stay for 8 readers


def test_growth_needs_room_only_for_what_comes_in_addition():
    """Readers of a running group fill the CPU nodes exactly; all they need is there already."""
    request = ResourceRequest({"CPU": 1, "GPU": 1}, {"CPU": 1}, 16)
    free = [{"CPU": 0, "GPU": 0}, {"CPU": 8, "GPU": 8}, {"CPU": 0}]
    assert largest_world_size((16,), request, free) is None
    assert largest_world_size((16,), request, free, present_workers=8) == 16
    each_its_own = ResourceRequest({"CPU": 1, "GPU": 1}, {"CPU": 1}, 1)
    assert largest_world_size((16,), each_its_own, free, present_workers=8) is None
    assert largest_world_size((16,), each_its_own, [*free, {"CPU": 8}], present_workers=8) == 16


def test_what_is_asked_of_an_autoscaler_is_what_is_missing():
    request = ResourceRequest({"CPU": 4, "GPU": 1}, {"CPU": 1}, 3)
    assert request.bundles(2) == [request.worker] * 2 + [request.reader] * 3
    assert request.bundles(4, present_workers=2) == [request.worker] * 2 + [request.reader]


def test_choosing_leaves_the_nodes_alone():
    node = {"CPU": 8, "GPU": 8}
    largest_world_size(SIZES, GPU, [node])
    assert node == {"CPU": 8, "GPU": 8}


def test_demand_of_a_configuration():
    data = {"sources": [{"manifest": "s3://b/m"}], "lanes": 8, "backend": "ray", "readers": 3}
    data["reader_resources"] = {"data": 1}
    request = ResourceRequest.of(job_config(data=data, cluster={"workers": {"max": 4, "cpus": 2}}))
    assert request == ResourceRequest({"CPU": 2}, {"CPU": 1, "data": 1}, 3)
    assert request.total_cpus(2) == 7
    assert request.total_cpus(4) == 12  # each of 4 workers has a reader of its own


def test_reader_processes_reserve_nothing():
    assert (
        ResourceRequest.of(
            job_config(data={"sources": [{"manifest": "s3://b/m"}], "lanes": 8, "readers": 3})
        ).num_readers(2)
        == 0
    )


def test_the_shortfall_in_one_line():
    text = shortfall(2, GPU, [{"CPU": 4.0, "GPU": 0.0}], [{"CPU": 32.0, "GPU": 8.0}])
    assert text == "needs 2 x {CPU: 4, GPU: 1}; 1 nodes have {CPU: 4, GPU: 0} free of {CPU: 32, GPU: 8}"
