"""Compute types of a stage: what is autocast, what may be rounded, and a GPU that has no bf16."""

import pytest
import torch

from isthmus.trainer.config.schema import StageConfig
from isthmus.trainer.engine import engine as module
from isthmus.trainer.engine.engine import Precision, allow_tf32
from isthmus.trainer.errors import TrainerError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_inside_have_the_type_and_those_outside_do_not(dtype):
    precision, x = Precision(torch.device("cpu"), dtype), torch.ones(2, 2)
    with precision.autocast():
        assert (x @ x).dtype is dtype
    assert (x @ x).dtype is torch.float32


def test_tf32_holds_for_products_and_convolutions_alike():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        allow_tf32(enabled=True)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
        allow_tf32(enabled=False)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_a_gpu_without_bf16_is_one_line_with_the_keys(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Tesla V100")
    sizes = {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "deepspeed": "stage1_zero1"}
    module._check_bf16(torch.device("cuda", 0), StageConfig(**sizes, precision="fp16"))
    with pytest.raises(TrainerError, match=r"V100 has no bf16; set stage1.precision and stage2"):
        module._check_bf16(torch.device("cuda", 0), StageConfig(**sizes, precision="bf16"))
