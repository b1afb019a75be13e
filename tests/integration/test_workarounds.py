"""DeepSpeed and torch still behave as `deepspeed_workarounds` says; where a test fails, remove the workaround."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.integration
GROUP = """
import datetime, importlib, sys
import torch, torch.distributed as dist
from torch._C._distributed_c10d import HashStore
dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1, timeout=datetime.timedelta(seconds=60))
"""


def ends_with(code: str, folder: Path) -> str:
    """Run code in a process of its own, without our workarounds; return the last line it wrote."""
    variables = {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", GROUP + code],
        env=os.environ | variables | {"TORCH_EXTENSIONS_DIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return (result.stdout + result.stderr).strip().splitlines()[-1]


def test_deepspeed_compiles_its_shared_memory_all_reduce(tmp_path: Path) -> None:
    code = """
import deepspeed
from deepspeed.accelerator import get_accelerator
def load(self): sys.exit("would compile")
type(get_accelerator().create_op_builder("ShareMemCommBuilder")).load = load
deepspeed.init_distributed(verbose=False)
print("nothing compiled")
"""
    assert ends_with(code, tmp_path) == "would compile"


def test_muon_imports_the_inductor(tmp_path: Path) -> None:
    code = """
import deepspeed
before = "torch._inductor" in sys.modules
importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
print(before, "torch._inductor" in sys.modules)
"""
    assert ends_with(code, tmp_path) == "False True"


def test_a_new_group_does_not_inherit_the_time_limit(tmp_path: Path) -> None:
    code = """
print(dist.new_group([0])._get_backend(torch.device("cpu")).options._timeout.total_seconds())
"""
    assert ends_with(code, tmp_path) == "1800.0"


def test_deepspeed_cannot_broadcast_a_scalar(tmp_path: Path) -> None:
    code = """
import deepspeed
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
deepspeed.init_distributed(verbose=False)
model = torch.nn.ParameterList([torch.nn.Parameter(torch.tensor(1.0)), torch.nn.Parameter(torch.ones(3, 3))])
config = {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True,
          "train_micro_batch_size_per_gpu": 1, "zero_force_ds_cpu_optimizer": False}
optimizer = torch.optim.AdamW(model.parameters())
try:
    deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    print("broadcast")
except RuntimeError as error:
    print(error)
"""
    assert "dim() cannot be 0" in ends_with(code, tmp_path)


def test_the_meta_device_takes_buffers_too() -> None:
    with torch.device("meta"):
        assert nn.BatchNorm1d(3).running_var.is_meta
