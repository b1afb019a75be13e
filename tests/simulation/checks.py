"""What must hold after every change of the store, and at the end of a schedule.

Manifests are read here by a few lines of their own, not by the product's reader, which is what is tested.
"""

import hashlib
import json
from typing import Any

from isthmus.trainer.runs.lease import STALE_HEARTBEATS
from tests.simulation.server import Bucket, Stored
from tests.simulation.world import Thread, Violation, World

RUN = "s3://bucket/runs/run"
Manifests = dict[int, dict[str, Any]]


class Checks:
    """Follows every change of the store; raises Violation at the first that breaks a promise.

    Args:
        steps: Of each stage.
        has_stale_lists: Whether listings from the past occur, of which the product says that commits need a store
            without them (docs/reliability.md): then only how the run ends is judged.
    """

    def __init__(self, steps: int, *, has_stale_lists: bool) -> None:
        self.bucket: Bucket
        self.world: World
        self._steps, self.has_stale_lists = steps, has_stale_lists
        self._lease: dict[str, Any] = {}
        self._run: dict[str, Any] = {}
        self._recorded: dict[str, Any] = {}
        self._manifests: dict[str, Manifests] = {}
        self._floor: dict[str, int] = {}
        """Newest step of each folder that the owner of the lease committed."""
        self._sha256: dict[str, str] = {}
        self._owners: dict[int, str] = {}
        self._renewed_at = 0.0
        self._retired: set[str] = set()
        """Checkpoints whose manifest was deleted."""
        self._late: set[str] = set()
        """Those whose manifest came after that, or from an earlier owner below a later step: they are not promised."""

    def changed(self, url: str, old: Stored | None, new: Stored | None, thread: Thread | None) -> None:
        """Judge a change of one object, which has just happened."""
        if url == f"{RUN}/lease.json":
            self._lease_changed(new)
        elif url == f"{RUN}/run.json":
            self._run_changed(new)
        elif "/checkpoints/" in url:
            self._checkpoint_changed(url, new, thread)
        elif url == f"{RUN}/config.yaml":
            self._check_writer(url, new)
        elif url.startswith(f"{RUN}/export/"):
            self._check_export(self._run.get("export"))

    def owner_began(self, token: int, name: str) -> None:
        """A driver says that it has become the owner."""
        if self._owners.setdefault(token, name) != name:
            self.fail(f"{name} and {self._owners[token]} have the same token {token}")

    def gave_up(self, driver: str) -> None:
        """A driver says that it has lost the run."""
        if self._lease.get("owner") == driver:
            self.fail(f"{driver} gives up the run, of which it is the owner")

    def _check_writer(self, url: str, new: Stored | None) -> None:
        """Check that nobody changes a file of the run that its owner has written already."""
        owner = self._owners.get(self._lease["token"])
        if owner is not None and new is not None and new.data.decode() != owner:
            self.fail(f"{url} was written by {new.data.decode()}, but {owner} is the owner")

    def recorded(self, section: str, key: str, value: Any) -> None:
        """A fact was recorded, says a process: it must stay."""
        if section == "facts":
            self._recorded[key] = value
            if self._run.get(section, {}).get(key) != value:
                self.fail(f"run.json lacks {key}, which was recorded")

    def restored(self, stage: str, token: int, step: int, floor: int) -> None:
        """A rank of the run's owner resumes from a step although one was committed at `floor` before it looked."""
        if step < floor and token == self._lease["token"] and not self.has_stale_lists:
            self.fail(f"{stage} resumes from step {step}, but step {floor} was committed")

    def newest(self, folder: str) -> int:
        """Return the newest step that a reader of a folder has to find; 0: none."""
        chosen = (0, 0)
        for step, manifest in sorted(self._manifests.get(folder, {}).items()):
            if manifest["token"] >= chosen[1]:
                chosen = (step, manifest["token"])
        return chosen[0]

    def fail(self, message: str) -> None:
        """End the schedule: a promise is broken."""
        self.world.failure = self.world.failure or Violation(message)
        raise Violation(message)

    def _lease_changed(self, new: Stored | None) -> None:
        if new is None:
            self.fail("lease.json was deleted")
            return
        old, self._lease = self._lease, json.loads(new.data)
        if not old:
            return
        step = self._lease["token"] - old["token"]
        if step not in (0, 1):
            self.fail(f"the token went from {old['token']} to {self._lease['token']}")
        if step == 0 and (
            self._lease["owner"] != old["owner"] or self._lease["beat"] <= old["beat"] or old["released"]
        ):
            self.fail(f"lease {old} was overwritten by {self._lease}")
        quiet = self.world.now - self._renewed_at
        if step == 1 and not old["released"] and quiet < STALE_HEARTBEATS * old["beat_seconds"]:
            self.fail(f"the lease was taken from {old['owner']}, which had renewed it {quiet:.1f} s before")
        self._renewed_at = self.world.now

    def _run_changed(self, new: Stored | None) -> None:
        if new is None:
            self.fail("run.json was deleted")
            return
        old, run = self._run, json.loads(new.data)
        self._run = run
        writer, owner = self.world.thread, self._owners.get(self._lease["token"])
        if writer is not None and owner is not None and writer.process.name.partition("/")[0] != owner:
            self.fail(f"run.json was written by {writer.process.name}, but {owner} is the owner")
        tokens = [attempt["token"] for attempt in run["attempts"]]
        if len(set(tokens)) < len(tokens):
            self.fail(f"run.json lists an attempt twice: {tokens}")
        lost = [key for key, value in self._recorded.items() if run.get("facts", {}).get(key) != value]
        if lost or tokens[: len(old.get("attempts", ()))] != [attempt["token"] for attempt in old.get("attempts", ())]:
            self.fail(f"run.json lost {lost or 'attempts'}")
        before, now = (record.get("handoffs", {}).get("stage2") for record in (old, run))
        if before is not None and before != now:
            self.fail(f"the hand-over was changed from {before} to {now}")
        if now is not None and before is None:
            self._check_handoff(now)
        if run.get("export") != old.get("export"):
            self._check_export(run.get("export"))

    def _check_handoff(self, record: dict[str, Any]) -> None:
        stored = self.bucket.objects.get(f"{record['url']}/MANIFEST.json")
        if stored is None or hashlib.sha256(stored.data).hexdigest() != record["identity"]:
            self.fail(f"stage 2 is to begin from {record['url']}, which is not committed like that")
        if not record["url"].endswith(f"{self._steps:09d}"):
            self.fail(f"stage 2 is to begin from {record['url']}, not from step {self._steps}")

    def _check_export(self, fact: dict[str, Any] | None) -> None:
        """Check that the export that run.json names is whole."""
        if fact is None:
            return
        names = ("model.safetensors", "config.json")
        found = [self.bucket.objects.get(f"{fact['url']}/{name}") for name in names]
        starts = [f"{fact['stage']} {name} ".encode() for name in names]
        if not all(stored and stored.data.startswith(start) for stored, start in zip(found, starts, strict=True)):
            self.fail(f"{fact['url']} is the run's export and not whole")

    def _checkpoint_changed(self, url: str, new: Stored | None, thread: Thread | None) -> None:
        folder, _, name = url.rpartition("/")
        if folder.endswith("/in-use"):
            return
        checkpoints, _, step_name = folder.rpartition("/")
        step = int(step_name.removeprefix("step-"))
        manifests = self._manifests.setdefault(checkpoints, {})
        if new is None:
            self._check_unused(folder, thread)
            if step not in manifests:
                self._retired.add(folder)  # a leftover: its manifest may still be on its way
        if name == "MANIFEST.json":
            self._manifest_changed(folder, step, manifests, new)
            self._check_newest(checkpoints)
        elif step in manifests:
            self._check_file(folder, name, manifests[step])

    def _manifest_changed(self, folder: str, step: int, manifests: Manifests, new: Stored | None) -> None:
        old = manifests.pop(step, None)
        if new is None:
            self._retired.add(folder)
            return
        manifest = manifests[step] = json.loads(new.data)
        if old is not None and manifest["token"] < old["token"]:
            self.fail(f"{folder} of token {old['token']} was replaced by token {manifest['token']}")
        if manifest["token"] > self._lease.get("token", 0):
            self.fail(f"{folder} has token {manifest['token']}, which nobody was given")
        checkpoints = folder.rpartition("/")[0]
        is_late = folder in self._retired or manifest["token"] < self._lease["token"]
        if step < self.newest(checkpoints) and is_late:
            self._late.add(folder)  # its put arrived after retention had deleted it: this prune or the next removes it
            return
        self._late.discard(folder)
        for entry in (*manifest["parts"], manifest["state"]):
            self._check_file(folder, entry["name"], manifest)
        if manifest["token"] == self._lease["token"] and step == self.newest(checkpoints):
            self._floor[checkpoints] = max(step, self._floor.get(checkpoints, 0))

    def _check_newest(self, checkpoints: str) -> None:
        newest, floor = self.newest(checkpoints), self._floor.get(checkpoints, 0)
        if newest < floor and not self.has_stale_lists:
            self.fail(f"{checkpoints}: the newest checkpoint is of step {newest}, but step {floor} was committed")

    def _check_file(self, folder: str, name: str, manifest: dict[str, Any]) -> None:
        """Check a file that a manifest names."""
        if self.has_stale_lists or folder in self._late:
            return
        entries = [entry for entry in (*manifest["parts"], manifest["state"]) if entry["name"] == name]
        for entry in entries:
            stored = self.bucket.objects.get(f"{folder}/{name}")
            if stored is None or self._digest(stored) != entry["sha256"]:
                self.fail(f"{folder} is torn: {name} is {'missing' if stored is None else 'different'}")

    def _check_unused(self, folder: str, thread: Thread | None) -> None:
        """Check that nobody read a checkpoint whose files are deleted when the deleting process looked at it last."""
        if thread is None or self.has_stale_lists:
            return
        marks = [stored for url, stored in self.bucket.objects.items() if url.startswith(f"{folder}/in-use/")]
        if any(mark.put_at < thread.listed_at for mark in marks):
            self.fail(f"{folder} is being read and was deleted")

    def _digest(self, stored: Stored) -> str:
        if stored.etag not in self._sha256:
            self._sha256[stored.etag] = hashlib.sha256(stored.data).hexdigest()
        return self._sha256[stored.etag]

    def at_end(self, stages: tuple[str, ...], *, is_exported: bool) -> None:
        """Check what is left when the run is finished and everything has ended."""
        if not self._lease.get("released"):
            self.fail("the lease is held although nobody is left")
        if self.bucket.uploads:
            self.fail(f"unfinished uploads are left: {sorted(url for url, _, _ in self.bucket.uploads.values())}")
        for stage in stages:
            folder = f"{RUN}/{stage}/checkpoints"
            if self.newest(folder) != self._steps:
                self.fail(f"{stage} ends at step {self.newest(folder)}, not {self._steps}")
            self._check_leftovers(folder)
        if is_exported:
            url = self._run.get("export", {}).get("url", "absent")
            strays = [u for u in self.bucket.objects if u.startswith(f"{RUN}/export/") and not u.startswith(f"{url}/")]
            if url == "absent" or strays:
                self.fail(f"the export is {url}; beside it are {strays}")

    def _check_leftovers(self, folder: str) -> None:
        manifests = self._manifests[folder]
        known = {
            f"{folder}/step-{step:09d}/{name}"
            for step, manifest in manifests.items()
            for name in ("MANIFEST.json", *(entry["name"] for entry in (*manifest["parts"], manifest["state"])))
        }
        there = {url for url in self.bucket.objects if url.startswith(f"{folder}/")}
        marked = {url.partition("/in-use/")[0] for url in there if "/in-use/" in url}  # by a reader that was cut off
        found = {url for url in there if url.rpartition("/")[0].partition("/in-use")[0] not in marked}
        if not found <= known:
            self.fail(f"left over in {folder}: {sorted(found - known)}")
