"""Planted faults: each breaks one protocol in the way that its name says, and the simulator has to find it.

A mutant is the product's own function with a piece of its source replaced, so it cannot grow old unnoticed: where the
piece is gone, applying the mutant fails.
"""

import inspect
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from isthmus.cluster.supervision import replica_store
from isthmus.cluster.supervision.restart_policy import RestartPolicy
from isthmus.data_pipeline.store.s3 import S3Backend
from isthmus.trainer.checkpoint import manager, retention
from isthmus.trainer.checkpoint.commit import BackgroundSaver
from isthmus.trainer.checkpoint.manager import CheckpointManager
from isthmus.trainer.runs import export, lease, store
from isthmus.trainer.runs.lease import Lease
from tests.simulation import faults, schedule


@dataclass(frozen=True)
class Mutant:
    """One planted fault."""

    name: str
    kind: str
    """Kind of the schedules that look for it."""
    owner: Any
    """Class or module in which the function is replaced."""
    function: str
    old: str
    """Piece of its source."""
    new: str


MUTANTS = (
    Mutant(
        "a new lease is put without a condition",
        "lease", Lease, "take",
        "put_if_absent(url,",
        "put(url,",
    ),
    Mutant(
        "a lease is taken over by a put instead of a compare-and-swap",
        "lease", Lease, "take",
        "store.compare_and_swap(url, mine.to_bytes(), etag)",
        "store.put(url, mine.to_bytes())",
    ),
    Mutant(
        "the next owner gets the same token",
        "lease", Lease, "take",
        "state.token + 1",
        "state.token",
    ),
    Mutant(
        "a lease is stale by the clocks of two machines",
        "lease", lease, "_watch",
        "while time.monotonic() < deadline:",
        "while time.time() < datetime.fromisoformat(state.since).timestamp() + 20:",
    ),
    Mutant(
        "a heartbeat that is seen does not prolong the watch",
        "lease", lease, "_watch",
        "now, version, time.monotonic() +",
        "now, version, 0 * time.monotonic() +",
    ),
    Mutant(
        "a renewal whose answer was lost is taken for a lost lease",
        "lease", Lease, "_read_ours",
        "if is_ours and",
        "if False and",
    ),
    Mutant(
        "run.json is put without a condition",
        "lease", store, "_swap",
        "compare_and_swap(url, new, version)",
        "put(url, new)",
    ),
    Mutant(
        "run.json is written without proof of ownership",
        "lease", store, "_swap",
        "assert_owner()",
        "pass",
    ),
    Mutant(
        "what killed writers left half uploaded stays",
        "stage", store, "_open",
        "store.remove_unfinished(url)",
        "pass",
    ),
    Mutant(
        "no fencing check under a driver's lease",
        "stage", store, "assert_token",
        "if state.token != token or",
        "if False and",
    ),
    Mutant(
        "the manifest is put before the state",
        "stage", BackgroundSaver, "_try_save",
        "self._store.put(join(folder, described.name), text)",
        "pass",
    ),
    Mutant(
        "the manifest is put before the other ranks' parts",
        "stage", BackgroundSaver, "_try_save",
        "self._store.put(join(folder, marker)",
        "self._store.put(join(folder, part.name), b''); self._store.put(join(folder, marker)",
    ),
    Mutant(
        "a manifest is put over another one",
        "stage", BackgroundSaver, "_commit",
        "put_if_absent(url, data)",
        "put(url, data)",
    ),
    Mutant(
        "a manifest of a later owner is replaced",
        "stage", BackgroundSaver, "_commit",
        "if _read_token(there, url) > self._ownership.token:",
        "if False:",
    ),
    Mutant(
        "a stage ends before its last commit",
        "run", CheckpointManager, "wait",
        "gather_lists([self._saver.wait(POLL_SECONDS)])",
        "[True]",
    ),
    Mutant(
        "the oldest checkpoints are kept",
        "stage", retention, "kept_steps",
        "[-config.keep_last :]",
        "[: config.keep_last]",
    ),
    Mutant(
        "retention deletes what is being read",
        "stage", retention, "_unwanted",
        "or any(",
        "or False and any(",
    ),
    Mutant(
        "retention deletes without proof of ownership",
        "stage", manager, "prune",
        "        assert_owner()",
        "        pass",
    ),
    Mutant(
        "a checkpoint's files are deleted before its manifest",
        "stage", retention, "delete_checkpoint",
        "key=lambda url: not url",
        "key=lambda url: url",
    ),
    Mutant(
        "a replica is preferred to a newer checkpoint",
        "peers", CheckpointManager, "newest",
        "replica.step <= saved.step",
        "replica.step > saved.step",
    ),
    Mutant(
        "parts of two snapshots make one replica",
        "peers", replica_store, "newest_complete",
        "setdefault(part.snapshot, {})",
        "setdefault(part.snapshot.session, {})",
    ),
    Mutant(
        "an export is recorded before it is uploaded",
        "run", export, "export_run",
        "            _upload_over(",
        "            run.record(**{EXPORT: fact})\n            _upload_over(",
    ),
    Mutant(
        "an export deletes what is published there",
        "run", export, "_upload_over",
        "if info.url not in names",
        "if info.url",
    ),
    Mutant(
        "a conditional put whose answer was lost is not read back",
        "s3", S3Backend, "_put_conditionally",
        "and uncertain and",
        "and False and",
    ),
    Mutant(
        "an outage of the store ends the run",
        "stage", RestartPolicy, "_after_outage",
        "if now - self._outage_began > limit:",
        "if True:",
    ),
)  # fmt: skip


@contextmanager
def planted(mutant: Mutant) -> Iterator[None]:
    """Replace the function of a mutant."""
    original = inspect.unwrap(getattr(mutant.owner, mutant.function))
    source = textwrap.dedent(inspect.getsource(original))
    if mutant.old not in source:
        raise LookupError(
            f"{mutant.name}: {mutant.function} has no {mutant.old!r} any more; bring the mutant up to date"
        )
    module = inspect.getmodule(original)
    scope: dict[str, Any] = {}
    exec(compile(source.replace(mutant.old, mutant.new, 1), mutant.function, "exec"), vars(module), scope)
    with patch.object(mutant.owner, mutant.function, scope[mutant.function]):
        yield


@dataclass(frozen=True)
class Found:
    """How a mutant was found."""

    mutant: Mutant
    num_schedules: int
    seconds: float
    """CPU time."""
    problem: str | None
    """What the simulator said; none: not found."""


def hunt(mutant: Mutant, limit: int = 5000) -> Found:
    """Run schedules against a mutant until one fails, inside `simulated`."""
    began, problem, seed = time.process_time(), None, -1
    with planted(mutant):
        while problem is None and seed + 1 < limit:
            seed += 1
            problem = schedule.run(seed, *faults.draw(seed, mutant.kind)).problem
    return Found(mutant, seed + 1, time.process_time() - began, problem)


def table(found: list[Found]) -> str:
    """Return the table of docs/reliability.md."""
    rows = ["| planted fault | found after schedules | CPU s | by |", "|---|---|---|---|"]
    for one in found:
        problem = (one.problem or "NOT FOUND").replace("s3://bucket/runs/run/", "").replace("Violation: ", "")
        rows.append(f"| {one.mutant.name} | {one.num_schedules} | {one.seconds:.1f} | {problem[:90]} |")
    return "\n".join(rows)
