"""`isthmus runs` and `isthmus checkpoints` over a run in a local folder."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from isthmus.cluster.cli import checkpoints, runs
from isthmus.cluster.errors import ClusterError
from isthmus.data_pipeline.store.object_store import ObjectStore
from tests.saved_states import fragments_of, manager, state_of
from tests.unit.trainer.test_run_store import open_run

pytestmark = pytest.mark.unit
STEPS = (1, 2, 3)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = open_run(tmp_path_factory.mktemp("runs"))
    saver = manager(run.checkpoints_url("stage1"), keep_last=9)
    for step in STEPS:
        saver.save(step, fragments_of(step), state_of(step, metrics={"eval/i2t_r1": 1 / step}))
        saver.wait()
    saver.close()
    first = f"{run.checkpoints_url('stage1')}/step-000000001"
    run.record(stages={"stage1": "finished"})
    run.record(handoffs={"stage2": {"url": first, "taken": ["a"], "dropped": []}})
    run.close()
    return run.url


def call(app: object, *arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def answer(app: object, *arguments: str, code: int = 0) -> object:
    result = call(app, *arguments, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.output)


def at(run_folder: str, step: int) -> str:
    return f"{run_folder}/stage1/checkpoints/step-{step:09d}"


def test_runs_ls_and_show(run_folder):
    (run,) = answer(runs.app, "ls", str(Path(run_folder).parent))
    assert run == {"name": "night", "url": run_folder, "holder": "free", "attempts": 1, "stages": {"stage1": [1, 2, 3]}}
    listed = call(runs.app, "ls", str(Path(run_folder).parent)).output.splitlines()
    assert [line.split() for line in listed] == [
        ["run", "checkpoints", "attempts", "writer"],
        ["night", "stage1", "step", "3", "1", "free"],
    ]
    shown = " ".join(call(runs.app, "show", run_folder).output.split())
    assert "writer free" in shown
    assert "stage1 finished; checkpoints at 1, 2, 3" in shown
    assert "stage2 from 1 tensors of" in shown
    assert re.search(r"attempt started \(UTC\) ended writer changed keys 1 [\d-]+ [\d:]+ [\d-]+ [\d:]+ ann", shown)


def test_runs_ls_asks_each_run_and_lists_none_of_their_files(run_folder, tmp_path, monkeypatch):
    folder = Path(run_folder).parent
    (folder / "damaged").mkdir(exist_ok=True)
    (folder / "damaged" / "run.json").write_text("{[")
    (folder / "no-run").mkdir(exist_ok=True)
    asked = []
    list_objects = ObjectStore.list
    monkeypatch.setattr(
        ObjectStore, "list", lambda self, url, *more: asked.append(url) or list_objects(self, url, *more)
    )
    found = {run["name"]: run for run in answer(runs.app, "ls", str(folder))}
    assert set(found) == {"night", "damaged"}
    assert "damaged" in found["damaged"]["problem"]
    assert found["night"]["stages"] == {"stage1": [1, 2, 3]}
    assert str(folder) not in asked
    assert run_folder not in asked


def test_ls(run_folder):
    found = answer(checkpoints.app, "ls", run_folder)
    assert [(item["step"], item["metrics"]) for item in found] == [
        (step, {"eval/i2t_r1": 1 / step}) for step in (3, 2, 1)
    ]
    assert [item["is_best"] for item in found] == [False, False, True]
    head, columns, *rows = call(checkpoints.app, "ls", run_folder).output.splitlines()
    assert head == f"{run_folder}/stage1/checkpoints"
    assert columns.split() == ["step", "size", "age", "ranks", "eval/i2t_r1"]
    assert [row.split()[0] for row in rows] == ["3", "2", "1"]
    assert [row.split()[-1] for row in rows] == ["0.3333", "0.5", "*"]
    assert all(re.search(r" \d+ (s|min)( |$)", row) for row in rows)
    assert max(map(len, [columns, *rows])) <= 100
    assert not [row for row in rows if row.endswith(" ")]


def test_verify_says_what_is_damaged(run_folder):
    part = next(Path(at(run_folder, 2)).glob("part-*"))
    good = part.read_bytes()
    part.write_bytes(good[:-1] + b"?")
    try:
        found = {item["url"]: item for item in answer(checkpoints.app, "verify", run_folder, code=2)}
        assert "sha256" in found[at(run_folder, 2)]["problems"][0]
        assert found[at(run_folder, 3)]["problems"] == []
        assert "DAMAGED" in call(checkpoints.app, "verify", at(run_folder, 2)).output
    finally:
        part.write_bytes(good)
    assert "intact" in call(checkpoints.app, "verify", at(run_folder, 2)).output


def test_diff(run_folder):
    assert answer(checkpoints.app, "diff", at(run_folder, 1), at(run_folder, 1)) == []
    found = answer(checkpoints.app, "diff", at(run_folder, 1), at(run_folder, 2), code=1)
    assert {"name": "qformer.a", "kind": "param", "difference": "35 of 35 elements differ, by at most 100"} in found
    assert "state.step: 1 against 2" in call(checkpoints.app, "diff", at(run_folder, 1), at(run_folder, 2)).output


def test_cp(run_folder, tmp_path):
    target = str(tmp_path / "copy" / "step-000000003")
    call(checkpoints.app, "cp", at(run_folder, 3), target)
    assert answer(checkpoints.app, "diff", at(run_folder, 3), target) == []
    refused = call(checkpoints.app, "cp", at(run_folder, 2), target)
    assert "holds another checkpoint" in str(refused.exception)


def test_prune_spares_what_was_handed_over(run_folder, tmp_path):
    dry = answer(checkpoints.app, "prune", run_folder, "--dry-run")
    assert dry[0]["steps"] == []
    folder = str(tmp_path / "c")
    for info in ObjectStore().list(f"{run_folder}/stage1/checkpoints"):
        ObjectStore().put(folder + info.url.split("checkpoints")[-1], ObjectStore().get(info.url))
    assert answer(checkpoints.app, "prune", folder)[0]["steps"] == [1]
    assert [item["step"] for item in answer(checkpoints.app, "ls", folder)] == [3, 2]


def test_rollback_deletes_what_came_after(run_folder, tmp_path):
    folder = str(tmp_path / "c")
    for info in ObjectStore().list(f"{run_folder}/stage1/checkpoints"):
        ObjectStore().put(folder + info.url.split("checkpoints")[-1], ObjectStore().get(info.url))
    first = f"{folder}/step-000000001"
    assert answer(checkpoints.app, "rollback", first, "--dry-run")["deleted"] == [3, 2]
    assert [item["step"] for item in answer(checkpoints.app, "ls", folder)] == [3, 2, 1]
    assert answer(checkpoints.app, "rollback", first)["deleted"] == [3, 2]
    assert [item["step"] for item in answer(checkpoints.app, "ls", folder)] == [1]
    assert "step-000000004" in str(call(checkpoints.app, "rollback", f"{folder}/step-000000004").exception)


def test_folder_without_checkpoints(tmp_path):
    assert isinstance(call(checkpoints.app, "ls", str(tmp_path)).exception, ClusterError)
