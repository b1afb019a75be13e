"""The lease, the configuration kept, the facts of a run, the hand-over; in a local folder, in one process."""

import json
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from isthmus.data_pipeline.errors import AccessError
from isthmus.data_pipeline.store.local_store import LocalBackend
from isthmus.data_pipeline.store.object_store import ObjectStore, UnavailableError, join
from isthmus.trainer.config.loading import check_config
from isthmus.trainer.config.schema import TrainConfig
from isthmus.trainer.errors import CheckpointError, ConfigError, LeaseError, TrainerError
from isthmus.trainer.runs import export
from isthmus.trainer.runs.export import export_run
from isthmus.trainer.runs.lease import Lease, LeaseState, read_lease
from isthmus.trainer.runs.stage2_init import init_from_stage1
from isthmus.trainer.runs.store import RunStore, export_folder, read_run
from tests.saved_states import fragments_of, full, manager, state_of

pytestmark = pytest.mark.unit
STORE = ObjectStore()
BEAT = 0.05


def config(folder: Path, **changes: object) -> TrainConfig:
    raw = {
        "run": {"name": "night", "url": str(folder)},
        "data": {"sources": [{"manifest": "m"}], "lanes": 2},
        "model": {"vision": {"path": "v"}, "language": {"path": "l"}},
        "stage1": {"steps": 4, "global_batch_size": 4, "micro_batch_size": 2, "deepspeed": "stage1_zero1"},
        "stage2": {"steps": 4, "global_batch_size": 4, "micro_batch_size": 2, "deepspeed": "stage2_zero3"},
    }
    for key, value in changes.items():
        target = raw
        *parents, last = key.split("__")
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = value
    return check_config(raw, TrainConfig, "test")


def open_run(folder: Path, owner: str = "ann", allow_change: tuple[str, ...] = (), **changes: object) -> RunStore:
    return RunStore.open(
        config(folder, **changes), STORE, owner=owner, allow_change=allow_change, heartbeat_seconds=BEAT
    )


def abandon(run: RunStore) -> None:
    """Stop the heart of a run without releasing its lease, as a killed process does."""
    run._lease._ended.set()
    run._lease._thread.join()


def test_second_writer_is_refused_with_holder_and_since(tmp_path):
    run = open_run(tmp_path, "ann")
    since = read_lease(join(run.url, "lease.json"), STORE).since
    with pytest.raises(LeaseError, match=rf"held by ann since {since.replace('+', '.')}"):
        open_run(tmp_path, "bob")
    run.close()


def test_a_store_that_forbids_to_list_uploads_costs_a_warning(tmp_path, monkeypatch, caplog):
    def forbidden(_backend, url):
        raise AccessError(f"list {url}: access denied (403)")

    monkeypatch.setattr(LocalBackend, "remove_unfinished", forbidden)
    open_run(tmp_path).close()
    assert "unfinished uploads of earlier attempts stay" in caplog.text
    assert "access denied" in caplog.text


def test_released_lease_is_taken_at_once(tmp_path):
    run = open_run(tmp_path, "ann")
    run.close()
    again = open_run(tmp_path, "bob")
    assert again.token == run.token + 1
    again.close()


def test_stale_lease_is_taken_over_and_the_old_writer_is_fenced_out(tmp_path):
    old = open_run(tmp_path, "ann")
    worker = RunStore.attach(config(tmp_path), STORE, old.token)
    worker.assert_owner()
    abandon(old)
    new = open_run(tmp_path, "bob")
    for store in (old, worker):
        with pytest.raises(LeaseError, match="held by bob"):
            store.assert_owner()
    new.assert_owner()
    old.close()
    new.assert_owner()
    new.close()


def test_staleness_does_not_trust_clocks(tmp_path):
    run = open_run(tmp_path)
    url = join(run.url, "lease.json")
    abandon(run)
    state = LeaseState.from_bytes(STORE.get(url), url)
    STORE.put(url, json.dumps(vars(state) | {"since": "2999-01-01T00:00:00+00:00"}).encode())
    again = open_run(tmp_path, "bob")
    again.close()


def test_lost_answer_of_a_heartbeat_is_no_takeover(tmp_path):
    url = join(str(tmp_path), "lease.json")
    lease = Lease.take(url, STORE, "ann", heartbeat_seconds=60)
    state = LeaseState.from_bytes(STORE.get(url), url)
    STORE.put(url, json.dumps(vars(state) | {"beat": 1}).encode())
    lease.assert_owner()
    lease.release()


def test_heart_beats(tmp_path):
    run = open_run(tmp_path)
    url = join(run.url, "lease.json")
    first = read_lease(url, STORE).beat
    deadline = time.monotonic() + 10
    while read_lease(url, STORE).beat < first + 3 and time.monotonic() < deadline:
        time.sleep(BEAT)
    assert read_lease(url, STORE).beat >= first + 3
    run.close()


def test_other_configuration_is_refused_with_the_difference(tmp_path):
    open_run(tmp_path).close()
    with pytest.raises(ConfigError, match=r"run.seed: 0 -> 7") as error:
        open_run(tmp_path, run__seed=7, stage1__steps=9)
    assert "stage1.steps: 4 -> 9   (possible with --allow-change stage1.steps)" in str(error.value)
    assert "run.seed: 0 -> 7   (possible" not in str(error.value)
    assert read_lease(join(str(tmp_path), "night", "lease.json"), STORE).released


@pytest.mark.parametrize(
    "changes",
    [
        {"stage1__micro_batch_size": 4},
        {"logging__every_steps": 1},
        {"checkpoint__keep_last": 5},
        {"data__readers": 4},
        {"safety__same_bits": "run"},
    ],
)
def test_what_does_not_change_training_may_change(tmp_path, changes):
    open_run(tmp_path).close()
    run = open_run(tmp_path, **changes)
    (change,) = run.facts()["attempts"][-1]["changes"]
    assert change["key"] == next(iter(changes)).replace("__", ".")
    run.close()


def test_a_run_of_an_older_release_lacks_new_keys_and_goes_on(tmp_path):
    open_run(tmp_path).close()
    stored = tmp_path / "night" / "config.yaml"
    lines = stored.read_text().splitlines(keepends=True)
    older = [line for line in lines if "label_smoothing" not in line and "trackers" not in line]
    assert len(older) == len(lines) - 2
    stored.write_text("".join(older))
    open_run(tmp_path).close()
    assert stored.read_text() == "".join(lines)
    stored.write_text("".join(older) + "of_another_release: 1\n")
    with pytest.raises(ConfigError, match="of_another_release"):
        open_run(tmp_path)


def test_allow_change(tmp_path):
    open_run(tmp_path).close()
    open_run(tmp_path, allow_change=("stage1.steps",), stage1__steps=9).close()
    open_run(tmp_path, stage1__steps=9).close()
    for key, value in (("run.seed", 7), ("data.lanes", 4), ("stage1.global_batch_size", 8)):
        with pytest.raises(ConfigError, match=key):
            open_run(tmp_path, allow_change=(key, "stage1.steps"), stage1__steps=9, **{key.replace(".", "__"): value})


def test_facts_are_merged_and_attempts_counted(tmp_path):
    run = open_run(tmp_path)
    run.record(stages={"stage1": "finished"})
    RunStore.attach(config(tmp_path), STORE, run.token).record(stages={"stage2": "begun"})
    assert run.facts()["stages"] == {"stage1": "finished", "stage2": "begun"}
    abandon(run)
    again = open_run(tmp_path)
    again.close()
    assert "ended" in again.facts()["attempts"][-1]
    assert "ended" not in again.facts()["attempts"][0]


def test_folder_that_is_no_run(tmp_path):
    with pytest.raises(TrainerError, match="not a run's folder"):
        read_run(str(tmp_path), STORE)


def stage1(run: RunStore, *steps: int, **metrics: float) -> None:
    checkpoints = manager(run.checkpoints_url("stage1"), token=run.token, keep_last=9)
    for step in steps:
        checkpoints.save(step, fragments_of(step), state_of(step, metrics=metrics if step == steps[0] else {}))
        checkpoints.wait()
    checkpoints.close()


def stage2_parameters() -> dict[str, nn.Parameter]:
    return {"qformer.a": nn.Parameter(torch.zeros(7, 5)), "projection.weight": nn.Parameter(torch.ones(2, 2))}


def test_init_from_stage1_takes_by_name_drops_the_rest_and_is_done_once(tmp_path):
    run = open_run(tmp_path)
    stage1(run, 2, 4)
    parameters = stage2_parameters()
    record = init_from_stage1(config(tmp_path), run, STORE, parameters)
    assert torch.equal(parameters["qformer.a"].flatten(), full(4)["qformer.a", "param"])
    assert torch.equal(parameters["projection.weight"], torch.ones(2, 2))
    assert record["taken"] == ["qformer.a"]
    assert record["dropped"] == ["projection.b", "qformer.temperature"]
    assert run.facts()["handoffs"]["stage2"] == record
    stage1(run, 6)
    again = stage2_parameters()
    assert init_from_stage1(config(tmp_path), run, STORE, again) == record
    assert torch.equal(again["qformer.a"], parameters["qformer.a"])
    run.close()


def test_init_from_stage1_of_the_best(tmp_path):
    changes = {"stage2__init_choice": "best", "checkpoint__keep_best": "eval/r1", "evaluation__manifest": "m"}
    run = open_run(tmp_path, **changes)
    stage1(run, 2, 4, **{"eval/r1": 0.5})
    parameters = stage2_parameters()
    init_from_stage1(config(tmp_path, **changes), run, STORE, parameters)
    assert torch.equal(parameters["qformer.a"].flatten(), full(2)["qformer.a", "param"])
    run.close()


def test_init_from_stage1_refuses_what_is_unfinished_damaged_or_foreign(tmp_path):
    run = open_run(tmp_path)
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        init_from_stage1(config(tmp_path), run, STORE, stage2_parameters())
    stage1(run, 2)
    with pytest.raises(CheckpointError, match="stands at step 2"):
        init_from_stage1(config(tmp_path), run, STORE, stage2_parameters())
    stage1(run, 4)
    with pytest.raises(CheckpointError, match=r"missing \['qformer.other'\]"):
        init_from_stage1(config(tmp_path), run, STORE, {"qformer.other": nn.Parameter(torch.zeros(1))})
    with pytest.raises(CheckpointError, match=r"qformer.a: \(7, 5\), the model has \(3,\)"):
        init_from_stage1(config(tmp_path), run, STORE, {"qformer.a": nn.Parameter(torch.zeros(3))})
    part = next((tmp_path / "night/stage1/checkpoints/step-000000004").glob("part-*"))
    part.write_bytes(part.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="is damaged"):
        init_from_stage1(config(tmp_path), run, STORE, stage2_parameters())
    assert "handoffs" not in run.facts()
    run.close()


class SlowStore(ObjectStore):
    """Its compare-and-swap gets no response until `respond` is set, or until its time limit."""

    def __init__(self) -> None:
        super().__init__()
        self.respond = threading.Event()
        self.respond.set()

    def compare_and_swap(self, url, data, etag):
        if not self.respond.wait(self.config.request_timeout_seconds or 60):
            raise UnavailableError(f"{url}: no response")
        return super().compare_and_swap(url, data, etag)


def test_a_heartbeat_without_response_is_given_up_before_the_lease_is_stale(tmp_path, caplog):
    store = SlowStore()
    lease = Lease.take(join(str(tmp_path), "lease.json"), store, "ann", heartbeat_seconds=0.2)
    store.respond.clear()
    deadline = time.monotonic() + 30
    while caplog.text.count("could not be renewed") < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert caplog.text.count("could not be renewed") >= 2
    store.respond.set()
    lease.release()


def test_a_commit_never_waits_behind_a_heartbeat(tmp_path):
    """With a lock held during requests it would wait for all retries of the heartbeat, here a minute."""
    store = SlowStore()
    lease = Lease.take(join(str(tmp_path), "lease.json"), store, "ann", heartbeat_seconds=60)
    store.respond.clear()
    heartbeat = threading.Thread(target=lease._renew, args=(lease._heartbeat_store,), daemon=True)
    heartbeat.start()
    lease._store = STORE
    commit = threading.Thread(target=lease.assert_owner, daemon=True)
    commit.start()
    commit.join(30)
    assert not commit.is_alive()
    assert heartbeat.is_alive()
    store.respond.set()
    heartbeat.join(30)
    lease.assert_owner()
    assert read_lease(lease.url, STORE).beat == 3
    lease.release()


def test_a_lease_of_a_later_release_is_read():
    state = LeaseState(3, "ann", "now", 5, 5.0)
    assert LeaseState.from_bytes(json.dumps(vars(state) | {"region": "x"}).encode(), "url") == state


def test_the_end_of_a_run_survives_an_outage_of_the_store(tmp_path, monkeypatch, caplog):
    run = open_run(tmp_path)

    def refuse(*_args):
        raise UnavailableError("503 on purpose")

    monkeypatch.setattr(run._lease._store, "compare_and_swap", refuse)
    run.close()
    assert "the end of this attempt could not be recorded" in caplog.text
    assert "the lease could not be released" in caplog.text


def test_export_appears_whole_and_never_mixes_with_an_earlier_one(tmp_path, monkeypatch):
    """Transformers prefers a stale model.safetensors to a newer index, so files of two exports must never meet."""

    def write(_config, _store, saved, folder, *_others):
        folder.mkdir()
        (folder / f"of-step-{saved.step}").write_text("x")
        (folder / "config.json").write_text(str(saved.step))

    monkeypatch.setattr(export, "_write", write)
    run, setup = open_run(tmp_path), config(tmp_path)
    (tmp_path / "night/export").mkdir()
    (tmp_path / "night/export/model.safetensors").write_text("of an earlier release")
    checkpoints = manager(run.checkpoints_url("stage2"), token=run.token, keep_last=9)
    for step in (2, 4):
        checkpoints.save(step, fragments_of(step), state_of(step))
        checkpoints.wait()
        folder = Path(export_run(setup, STORE, run))
        assert folder == tmp_path / f"night/export/stage2-step-00000000{step}"
        assert {path.name for path in folder.iterdir()} == {f"of-step-{step}", "config.json"}
        assert [path.name for path in (tmp_path / "night/export").iterdir() if any(path.iterdir())] == [folder.name]
        assert export_folder(run.facts()) == f"export/{folder.name}"
    checkpoints.save(6, fragments_of(6), state_of(6))
    checkpoints.wait()
    checkpoints.close()

    def refuse(url, _path):
        raise UnavailableError(f"{url}: 503 on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(STORE, "put_file", refuse)
        with pytest.raises(UnavailableError):
            export_run(setup, STORE, run)
    assert export_folder(run.facts()) == f"export/{folder.name}", "the earlier one stays until the new one is whole"
    (tmp_path / "night/export/stage2-step-000000006").mkdir()
    (tmp_path / "night/export/stage2-step-000000006/stale").write_text("of an interrupted upload")
    assert {path.name for path in Path(export_run(setup, STORE, run)).iterdir()} == {"of-step-6", "config.json"}
    run.close()


@pytest.mark.parametrize("fact", [{}, {"url": "s3://b/night/export"}, None, 3])
def test_exports_of_earlier_releases_are_found(fact):
    assert export_folder({"export": fact}) == "export"


def test_an_outage_is_no_damage_of_the_record(tmp_path, monkeypatch):
    """Which the simulator found: the store's error was a ValueError, and so "restore run.json from a copy"."""
    open_run(tmp_path).close()

    def refuse(url):
        raise UnavailableError(f"{url}: 503 on purpose")

    store = ObjectStore()
    monkeypatch.setattr(store, "get", refuse)
    with pytest.raises(UnavailableError):
        read_run(join(str(tmp_path), "night"), store)


def test_an_earlier_owner_changes_neither_record_nor_configuration(tmp_path):
    zombie = open_run(tmp_path, "ann")
    abandon(zombie)
    attached = RunStore.attach(config(tmp_path), STORE, zombie.token)
    run = open_run(tmp_path, "bob")
    for earlier in (zombie, attached):
        with pytest.raises(LeaseError, match="bob"):
            earlier.record(handoffs={"stage2": "of ann"})
    assert "handoffs" not in run.facts()
    run.close()


def test_an_owner_that_is_overtaken_between_reading_and_writing_changes_nothing(tmp_path):
    """The proof of ownership lies between the two, so what a new owner writes in its first moment is not undone."""
    zombie = open_run(tmp_path, "ann")
    prove = zombie.assert_owner
    overtaking: list[RunStore] = []

    def prove_then_freeze() -> None:
        prove()
        zombie.assert_owner = prove
        abandon(zombie)
        overtaking.append(open_run(tmp_path, "bob"))

    zombie.assert_owner = prove_then_freeze
    with pytest.raises(LeaseError, match="bob"):
        zombie.record(stages={"stage1": "finished"})
    (run,) = overtaking
    assert [attempt["owner"] for attempt in run.facts()["attempts"]] == ["ann", "bob"]
    assert "stages" not in run.facts()
    run.close()


def test_a_late_export_of_an_earlier_owner_leaves_the_published_one_whole(tmp_path, monkeypatch):
    def write(_config, _store, saved, folder, *_others):
        folder.mkdir()
        (folder / "model.safetensors").write_text(str(saved.step))

    monkeypatch.setattr(export, "_write", write)
    run = open_run(tmp_path)
    checkpoints = manager(run.checkpoints_url("stage2"), token=run.token)
    checkpoints.save(2, fragments_of(2), state_of(2))
    checkpoints.wait()
    checkpoints.close()

    class Late(ObjectStore):
        """Has answered before the owner's export and deletes after it."""

        def delete(self, url: str) -> None:
            assert "export" not in url or Path(url).name != "model.safetensors"
            super().delete(url)

    late = RunStore.attach(config(tmp_path), STORE, run.token)
    monkeypatch.setattr(late, "facts", dict)
    published = Path(export_run(config(tmp_path), STORE, run))
    assert export_run(config(tmp_path), Late(), late) == str(published)
    assert (published / "model.safetensors").read_text() == "2"
    run.close()


def test_an_export_that_was_killed_before_it_tidied_up_is_tidied_by_the_next_start(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_write", lambda *args: (args[3].mkdir(), (args[3] / "weights").write_text("x")))
    run = open_run(tmp_path)
    checkpoints = manager(run.checkpoints_url("stage2"), token=run.token)
    checkpoints.save(2, fragments_of(2), state_of(2))
    checkpoints.wait()
    checkpoints.close()
    export_run(config(tmp_path), STORE, run)
    earlier = tmp_path / "night/export/stage2-step-000000001/weights"
    earlier.parent.mkdir()
    earlier.write_text("its deletion was cut short")
    export_run(config(tmp_path), STORE, run)
    assert not earlier.exists()
    run.close()
