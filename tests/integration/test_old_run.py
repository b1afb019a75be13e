"""A run that e100c06 began and was stopped is read and resumed by today's code: same losses, same bits.

Bits of a training step depend on the kind of CPU, so the very bits are compared where the kind is the one on which the
run was made (tests/data/run_of_e100c06/README.md); the losses of every resumed step are compared on any CPU.
"""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from isthmus.cluster.config import JobConfig
from isthmus.cluster.status import RunState, read_status
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.trainer.checkpoint.reader import list_checkpoints
from isthmus.trainer.config.loading import load_config
from isthmus.trainer.context import Outcome
from isthmus.trainer.monitoring.segments import read_records
from isthmus.trainer.run_local import train_here
from isthmus.trainer.runs.lease import read_lease
from isthmus.trainer.runs.store import read_run
from tests.ranks import run_ranks

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
MADE = Path(__file__).parents[1] / "data" / "run_of_e100c06"
SHARD_WRITTEN_AT_NS = 0x18EC08E1DC53930D
"""The etag of a local file is its size and time; a checkout does not keep the time."""
MADE_ON = ("AuthenticAMD", "26", "2", "2.13.0", False)
"""Vendor, family and model of the CPU, torch, and whether kernels were chosen by the environment."""
KERNEL_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
STEPS = {"stage1": 6, "stage2": 4}


def kind_of_machine() -> tuple[str, str, str, str, bool]:
    text = Path("/proc/cpuinfo").read_text()
    cpu = [found[1] if (found := re.search(rf"^{key}\s*:\s*(\S+)", text, re.MULTILINE)) else "" for key in
           ("vendor_id", "cpu family", "model")]  # fmt: skip
    return (*cpu, torch.__version__.partition("+")[0], any(name in os.environ for name in KERNEL_VARIABLES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files, as they were on the machine that wrote them."""
    folder = tmp_path_factory.mktemp("old") / "run"
    shutil.copytree(MADE, folder)
    os.utime(folder / "assets/shards/train-00000.tar", ns=(SHARD_WRITTEN_AT_NS, SHARD_WRITTEN_AT_NS))
    return folder


def resume(_rank: int, _world_size: int, folder: Path) -> list[Outcome]:
    """Resume both runs to their end; their configuration has places relative to the folder."""
    os.chdir(folder)
    stopped = [Path(name) / "tiny" / "config.yaml" for name in ("stopped-in-stage1", "stopped-in-stage2")]
    return [train_here(load_config(config, [], JobConfig)) for config in stopped]


@pytest.fixture(scope="module")
def resumed(folder: Path) -> Path:
    (outcomes,) = run_ranks(resume, 1, folder, timeout_seconds=200)
    assert outcomes == [Outcome.FINISHED] * 2
    return folder


def losses(folder: Path, run: str, stage: str) -> dict[int, float]:
    records = read_records(str(folder / run / "tiny" / stage), "metrics", ObjectStore())
    found = [(record["step"], record["loss/total"]) for record in records if "loss/total" in record]
    assert [step for step, _ in found] == list(range(1, STEPS[stage] + 1))
    return dict(found)


def last_part(folder: Path, run: str, stage: str) -> Path:
    (part,) = (folder / run / "tiny" / stage / "checkpoints" / f"step-{STEPS[stage]:09d}").glob("part-*")
    return part


@pytest.mark.parametrize("run", ["stopped-in-stage1", "stopped-in-stage2"])
def test_a_run_begun_by_e100c06_is_resumed_with_the_same_losses(resumed: Path, run: str) -> None:
    for stage in STEPS:
        assert losses(resumed, run, stage) == pytest.approx(losses(MADE, "whole", stage), rel=1e-4)


@pytest.mark.parametrize("run", ["stopped-in-stage1", "stopped-in-stage2"])
def test_a_run_begun_by_e100c06_ends_with_the_same_bits(resumed: Path, run: str) -> None:
    if kind_of_machine() != MADE_ON:
        pytest.skip(f"the bits were made on {MADE_ON}, this is {kind_of_machine()}")
    for stage, old in (("stage1", "stopped-in-stage2"), ("stage2", "whole")):
        assert last_part(resumed, run, stage).read_bytes() == last_part(MADE, old, stage).read_bytes()


def test_the_other_files_of_e100c06_are_read() -> None:
    store = ObjectStore()
    url = str(MADE / "stopped-in-stage1" / "tiny")
    assert [attempt["token"] for attempt in read_run(url, store)["attempts"]] == [1]
    lease = read_lease(f"{url}/lease.json", store)
    assert lease is not None
    assert lease.released
    status = read_status(url, store)
    assert status is not None
    assert (status.state, status.step, status.restarts[0].phases) == (
        RunState.STOPPED,
        3,
        {"clear": 0.5, "start": 12.0},
    )
    (saved,) = list_checkpoints(f"{url}/stage1/checkpoints", store)
    assert (saved.step, saved.verify(), saved.state.stage) == (3, [], "stage1")
    saved.close()
