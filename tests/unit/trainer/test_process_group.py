"""Which device a rank takes, with the CUDA calls replaced: a node of eight GPUs as Ray and as torchrun show it."""

import os
from types import SimpleNamespace

import pytest
import torch

from isthmus.trainer.context import Rank
from isthmus.trainer.engine import process_group as module
from isthmus.trainer.engine.process_group import ENVIRONMENT, process_group, select_device, set_determinism
from isthmus.trainer.errors import TrainerError

pytestmark = pytest.mark.unit


class Node:
    """Stands for CUDA on one node: how many GPUs this process sees, and the calls in their order."""

    def __init__(self, monkeypatch, visible, uuids=()):
        self.calls = []
        self.init = {}
        monkeypatch.delenv("DS_ACCELERATOR", raising=False)
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: self.calls.append(("set_device", device)))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"gpu-{device}"))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA H100")
        monkeypatch.setattr(module.dist, "init_process_group", self._init)
        monkeypatch.setattr(module.dist, "get_world_size", lambda: max(1, len(uuids)))
        monkeypatch.setattr(module.dist, "all_gather_object", lambda into, _own: into.__setitem__(slice(None), uuids))
        monkeypatch.setattr(module, "_destroy_group", lambda: self.calls.append(("destroy", None)))

    def _init(self, backend, **options):
        self.calls.append(("init", backend))
        self.init = options


@pytest.mark.parametrize("local_rank", range(8))
def test_a_worker_that_sees_one_gpu_takes_that_one(monkeypatch, local_rank):
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    node = Node(monkeypatch, visible=1)
    assert select_device(Rank(local_rank, 8, local_rank)) == torch.device("cuda", 0)
    assert os.environ["LOCAL_RANK"] == "0"  # DeepSpeed calls set_device(LOCAL_RANK)
    assert node.calls == [("set_device", 0)]


@pytest.mark.parametrize("local_rank", range(8))
def test_a_rank_of_torchrun_takes_the_gpu_of_its_local_rank(monkeypatch, local_rank):
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    node = Node(monkeypatch, visible=8)
    assert select_device(Rank(8 + local_rank, 16, local_rank)) == torch.device("cuda", local_rank)
    assert os.environ["LOCAL_RANK"] == str(local_rank)
    assert node.calls == [("set_device", local_rank)]


def test_fewer_gpus_than_ranks(monkeypatch):
    Node(monkeypatch, visible=2)
    with pytest.raises(TrainerError, match=r"local rank 2, but this node has 2 GPUs; .*nproc-per-node"):
        select_device(Rank(2, 4, 2))


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((8, 6), ["sm_80", "sm_90"], True),  # a binary of the same major version
        ((12, 0), ["sm_80", "compute_90"], True),  # PTX is compiled for a later GPU
        ((12, 0), ["sm_80", "sm_90a"], False),
        ((7, 0), ["sm_75", "sm_80"], False),
    ],
)
def test_a_gpu_that_this_torch_has_no_kernels_for_is_one_line(monkeypatch, capability, built_for, runs):
    Node(monkeypatch, visible=1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built_for)
    if runs:
        assert select_device(Rank(0, 1)).index == 0
    else:
        with pytest.raises(TrainerError, match=r"is sm_\d+, but this build of torch .*install a build"):
            select_device(Rank(0, 1))


def test_determinism_is_set_for_the_process_and_undone(monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    try:
        with process_group(Rank(0, 1), 60, deterministic=True):
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            assert not torch.backends.cuda.cudnn_sdp_enabled()
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
            assert os.environ["NCCL_ALGO"] == "Ring"
    finally:
        set_determinism(enabled=False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_cpu_where_it_is_asked_for_or_the_only_device(monkeypatch):
    node = Node(monkeypatch, visible=8)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert select_device(Rank(0, 1)).type == "cpu"
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_device(Rank(3, 8, 3)).type == "cpu"
    assert node.calls == []


def test_the_device_is_set_before_the_group_and_bound_to_it(monkeypatch):
    node = Node(monkeypatch, visible=8, uuids=["a", "b"])
    with process_group(Rank(1, 2, 1), 60) as device:
        assert device == torch.device("cuda", 1)
    assert node.calls == [("set_device", 1), ("init", "cpu:gloo,cuda:nccl"), ("destroy", None)]
    assert node.init["device_id"] == device
    assert node.init["timeout"].total_seconds() == 60


def test_two_ranks_on_one_gpu_are_refused_and_the_group_is_left(monkeypatch):
    node = Node(monkeypatch, visible=1, uuids=["a", "b", "a"])
    with pytest.raises(TrainerError, match=r"ranks \[0, 2\] share a GPU"), process_group(Rank(0, 3), 60):
        pass
    assert node.calls[-1] == ("destroy", None)
