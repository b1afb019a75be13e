"""What a stage's monitor measures and writes, with a GPU's rate where there is none."""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch

from isthmus.cluster.config import JobConfig
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.model.objectives.step import LossOutput
from isthmus.trainer.config.loading import load_config
from isthmus.trainer.context import LocalContext
from isthmus.trainer.engine.step_status import StepStatus
from isthmus.trainer.estimate.flops import Text
from isthmus.trainer.estimate.hardware import gpu_of_device
from isthmus.trainer.estimate.model_flops import text_of
from isthmus.trainer.monitoring import monitor as module
from isthmus.trainer.monitoring.monitor import Monitor
from isthmus.trainer.monitoring.segments import read_records

pytestmark = pytest.mark.unit
LOSSES = LossOutput(torch.tensor(2.0), {"itc": torch.tensor(2.0)}, {})
STEPS = 4


def run(tmp_path, *overrides, work=(30.0, 20.0), retries=lambda _device: 0.0):
    """Go through some steps of half a second each; return the records."""
    config = load_config(
        "tiny.yaml",
        [f"stage1.steps={STEPS}", "stage1.global_batch_size=8", "logging.every_steps=2", *overrides],
        JobConfig,
    )
    with Monitor(config, "stage1", LocalContext(), ObjectStore(), str(tmp_path)) as monitor:
        monitor.start()
        monitor.resume(0, torch.device("cpu"))
        monitor.expect_work(*work)
        for step in monitor.batches(range(1, STEPS + 1)):
            monitor.on_step_begin(step)
            torch.ones(4) @ torch.ones(4)
            status = StepStatus(None, step == 2, 0.5, 0.125, 3e9)
            monitor.on_step_end(step, status)
            if monitor.record_due(step):
                monitor.record(step, LOSSES, torch.tensor(3.0), status, {"optim/lr": 1e-3}, None)
    return read_records(str(tmp_path / "stage1"), "metrics", ObjectStore())


def test_a_record_holds_the_window_since_the_last_one(tmp_path):
    first, second = run(tmp_path)
    assert (first["step"], second["step"]) == (2, 4)
    for record in (first, second):
        assert record["speed/images_per_second"] == 8 / 0.5
        assert record["speed/step_seconds"] == 0.5
        assert record["speed/data_wait_fraction"] == 0.25
        assert record["optim/skipped_steps"] == 1.0
        assert record["memory/gigabytes"] == 3.0
        assert (record["loss/itc"], record["optim/grad_norm"]) == (2.0, 3.0)
        assert "speed/mfu" not in record  # a CPU has no peak in the table


def test_utilisation_by_the_model_and_of_the_hardware(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "peak_flops", lambda _device: 1000.0)
    record, _ = run(tmp_path)
    assert record["speed/mfu"] == pytest.approx(16 * 20 / 1000)
    assert record["speed/hfu"] == pytest.approx(16 * 30 / 1000)


def test_without_a_formula_there_is_no_mfu(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "peak_flops", lambda _device: 1000.0)
    record, _ = run(tmp_path, work=(30.0, None))
    assert "speed/mfu" not in record
    assert record["speed/hfu"] == pytest.approx(16 * 30 / 1000)


def test_peak_memory_is_reset_with_each_record(tmp_path, monkeypatch):
    resets = []
    monkeypatch.setattr(module, "reset_peak_memory", resets.append)
    run(tmp_path)
    assert len(resets) == 2


def test_chosen_steps_are_traced(tmp_path):
    run(tmp_path, "logging.profile_steps=[2,3]")
    (trace,) = (tmp_path / "stage1/profile").iterdir()
    assert trace.name == "steps-000000002-000000003.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "aten::dot" for event in events) == 2


def test_a_trace_that_was_not_finished_is_dropped(tmp_path):
    run(tmp_path, "logging.profile_steps=[4,9]")
    assert not (tmp_path / "stage1/profile").exists()


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("NVIDIA A100 80GB PCIe", "a100-80g"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA RTX A6000", "rtx-a6000"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_cards_are_known_by_the_name_that_the_driver_gives_them(device, name):
    assert gpu_of_device(device).name == name
    assert gpu_of_device("NVIDIA GeForce GT 1030") is None


def test_lengths_of_text_are_those_without_padding():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    labels = torch.tensor([[5, 6, -100], [5, 6, 7]])
    batch = SimpleNamespace(tokens={"attention_mask": mask, "labels": labels})
    assert text_of(batch, encoder_decoder=False) == Text(real=3.5)
    both = text_of(batch, encoder_decoder=True)
    assert (both.prefix, both.suffix) == (3.5, 2.5)
