"""A run that e100c06 began and was stopped is read and resumed by today's code (tests/data/run_of_e100c06/README.md).

Today's code adds the same terms in another order, so the losses are those of e100c06 up to rounding: on the machine
that made the files, two of nine steps differ, by one unit in the last place. What it resumes from that commit's files
is exact: the same bits, whether or not it is interrupted again.
"""

import os
import shutil
from pathlib import Path

import pytest

from isthmus.cluster.config import JobConfig
from isthmus.cluster.status import RunState, read_status
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.trainer.checkpoint.reader import list_checkpoints
from isthmus.trainer.config.loading import load_config
from isthmus.trainer.context import LocalContext, Outcome, StopReason
from isthmus.trainer.monitoring.segments import read_records
from isthmus.trainer.run_local import train_here
from isthmus.trainer.runs.lease import read_lease
from isthmus.trainer.runs.store import read_run
from tests.ranks import run_ranks

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
MADE = Path(__file__).parents[1] / "data" / "run_of_e100c06"
SHARD_WRITTEN_AT_NS = 0x18EC08E1DC53930D
"""The etag of a local file is its size and time; a checkout does not keep the time."""
RUNS = ("stopped-in-stage1", "stopped-in-stage2")
STEPS = {"stage1": 6, "stage2": 4}


class StopAfterOneStep(LocalContext):
    """Asks to stop in the first step."""

    def stop_request(self) -> StopReason:
        return StopReason.OPERATOR


def copied(folder: Path) -> Path:
    """Copy the files as they were on the machine that wrote them."""
    shutil.copytree(MADE, folder)
    os.utime(folder / "assets/shards/train-00000.tar", ns=(SHARD_WRITTEN_AT_NS, SHARD_WRITTEN_AT_NS))
    return folder


def resume(_rank: int, _world_size: int, folder: Path, *, interrupted: bool) -> list[Outcome]:
    """Resume both runs to their end; their configurations name places relative to the folder."""
    os.chdir(folder)
    configs = [load_config(Path(run) / "tiny" / "config.yaml", [], JobConfig) for run in RUNS]
    if interrupted:
        assert [train_here(config, StopAfterOneStep()) for config in configs] == [Outcome.STOPPED] * len(RUNS)
    return [train_here(config) for config in configs]


def resume_both(rank: int, world_size: int, straight: Path, interrupted: Path) -> list[Outcome]:
    return [
        *resume(rank, world_size, straight, interrupted=False),
        *resume(rank, world_size, interrupted, interrupted=True),
    ]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Both runs resumed to their end: in one go, and with another stop on the way."""
    folder = tmp_path_factory.mktemp("old")
    straight, interrupted = copied(folder / "straight"), copied(folder / "interrupted")
    (outcomes,) = run_ranks(resume_both, 1, straight, interrupted, timeout_seconds=250)
    assert outcomes == [Outcome.FINISHED] * 4
    return straight, interrupted


def losses(folder: Path, run: str, stage: str) -> dict[int, float]:
    records = read_records(str(folder / run / "tiny" / stage), "metrics", ObjectStore())
    found = [(record["step"], record["loss/total"]) for record in records if "loss/total" in record]
    assert [step for step, _ in found] == list(range(1, STEPS[stage] + 1))
    return dict(found)


def last_part(folder: Path, run: str, stage: str) -> bytes:
    (part,) = (folder / run / "tiny" / stage / "checkpoints" / f"step-{STEPS[stage]:09d}").glob("part-*")
    return part.read_bytes()


@pytest.mark.parametrize("run", RUNS)
def test_a_run_begun_by_e100c06_is_resumed_with_its_losses(resumed: tuple[Path, Path], run: str) -> None:
    for stage in STEPS:
        expected = losses(MADE, "whole", stage)
        assert min(expected.values()) > 1  # real samples
        assert losses(resumed[0], run, stage) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("run", RUNS)
def test_a_run_begun_by_e100c06_ends_with_the_same_bits_however_often_it_stops(
    resumed: tuple[Path, Path], run: str
) -> None:
    straight, interrupted = resumed
    for stage in STEPS:
        assert losses(straight, run, stage) == losses(interrupted, run, stage)
        assert last_part(straight, run, stage) == last_part(interrupted, run, stage)


def test_the_other_files_of_e100c06_are_read() -> None:
    store = ObjectStore()
    url = str(MADE / "stopped-in-stage1" / "tiny")
    assert [attempt["token"] for attempt in read_run(url, store)["attempts"]] == [1]
    lease = read_lease(f"{url}/lease.json", store)
    assert lease is not None
    assert lease.released
    status = read_status(url, store)
    assert status is not None
    assert (status.state, status.step) == (RunState.STOPPED, 3)
    assert status.restarts[0].phases == {"clear": 0.5, "start": 12.0}
    (saved,) = list_checkpoints(f"{url}/stage1/checkpoints", store)
    assert (saved.step, saved.verify(), saved.state.stage) == (3, [], "stage1")
    saved.close()
