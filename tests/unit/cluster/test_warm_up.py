"""A spare has imported everything and started no CUDA: it does not know yet which GPU will be its own."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.unit
CODE = """
import sys, torch
def refuse(*_):
    raise AssertionError("CUDA was asked, which fixes the devices that this process sees")
for name in ("is_available", "device_count", "current_device", "get_device_capability", "init", "_lazy_init"):
    setattr(torch.cuda, name, refuse)
from isthmus.cluster.workers import rank
from tests.unit.cluster.configs import job_config
rank.warm_up(job_config("/nowhere"))
print([name in sys.modules for name in ("deepspeed", "transformers", "isthmus.trainer.trainer")])
"""


def test_warming_up_imports_deepspeed_for_cuda_without_starting_it():
    environment = {**os.environ, "DS_ACCELERATOR": "cuda", "OMP_NUM_THREADS": "1"}  # as TrainWorker sets it
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["[True, True, True]"], done.stderr
