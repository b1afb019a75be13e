"""Compares a disturbed run with the undisturbed one, and looks for leftovers."""

import hashlib
import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from isthmus.data_pipeline.store.object_store import join
from isthmus.trainer.checkpoint.reader import list_checkpoints, list_step_dirs
from isthmus.trainer.monitoring.segments import read_records
from isthmus.trainer.runs.lease import read_lease
from tests.chaos.faults import number_of_files
from tests.chaos.pipeline import BUCKET, STEPS, Run

ENDING_SECONDS = 20.0

Keys = dict[tuple[str, int], list[tuple[int, str, bool, tuple[int, ...]]]]
"""(stage, step) -> row, key, validity and (source, epoch, position) of each sample of the global batch, by row."""


@dataclass(frozen=True)
class Ending:
    """What a finished run leaves behind."""

    digests: dict[str, str]
    losses: dict[str, list[tuple[int, float]]]
    keys: Keys
    export: str


def ending(run: Run) -> Ending:
    """Read what a finished run has left behind."""
    store = run.store
    digests, losses = {}, {}
    for stage, steps in STEPS.items():
        saved = list_checkpoints(join(run.url, stage, "checkpoints"), store)[0]
        digests[stage] = f"step {saved.step}: {saved.digest()}"
        assert saved.step == steps, f"{stage} ends at step {saved.step}, not at {steps}"
        records = read_records(join(run.url, stage), "metrics", store)
        losses[stage] = [(record["step"], record["loss/total"]) for record in records if "loss/total" in record]
    exported = hashlib.sha256()
    for info in store.list(join(run.url, "export")):
        if info.url.endswith(".safetensors"):
            exported.update(store.get(info.url))
    return Ending(digests, losses, _consumed(run), exported.hexdigest())


def problems(run: Run, expected: Ending) -> list[str]:
    """Return what is wrong with how a run ended, one line each."""
    found = [f"attempt {a.number}: rank {rank} hung" for a in run.attempts for rank in a.hung]
    if not run.attempts or not run.attempts[-1].finished:
        codes = [attempt.codes for attempt in run.attempts]
        return [*found, f"not finished after {len(run.attempts)} starts, exit codes {codes}"]
    try:
        actual = ending(run)
    except Exception as error:  # noqa: BLE001 - whatever cannot be read is a problem of the run
        return [*found, f"the end cannot be read: {type(error).__name__}: {error}"]
    found += [f"{stage}: other final state" for stage in STEPS if actual.digests[stage] != expected.digests[stage]]
    found += [] if actual.export == expected.export else ["other export"]
    for stage in STEPS:
        found += _compare_losses(stage, actual.losses[stage], expected.losses[stage])
    found += _compare_keys(actual.keys, expected.keys)
    return found + _leftovers(run)


def _compare_losses(stage: str, actual: list[tuple[int, float]], expected: list[tuple[int, float]]) -> list[str]:
    if [step for step, _ in actual] != [step for step, _ in expected]:
        return [f"{stage}: the metrics have steps {[step for step, _ in actual]}"]
    pairs = zip(actual, expected, strict=True)
    return [
        f"{stage} step {step}: loss {one!r}, undisturbed {other!r}" for (step, one), (_, other) in pairs if one != other
    ]


def _consumed(run: Run) -> Keys:
    """Return the samples of each step; every execution of a step, in whatever start, must have had the same ones.

    A step that a kill has caught between two ranks is incomplete in that start, never different.
    """
    found: dict[tuple[str, int], dict[int, tuple[int, str, bool, tuple[int, ...]]]] = {}
    for record in run.records():
        step = found.setdefault((record["stage"], record["step"]), {})
        rows = zip(record["rows"], record["keys"], record["valid"], record["positions"], strict=True)
        for row, key, valid, position in rows:
            sample = (row, key, valid, tuple(position))
            assert step.setdefault(row, sample) == sample, f"{record['stage']} step {record['step']}: other samples"
    return {place: [rows[row] for row in sorted(rows)] for place, rows in found.items()}


def _compare_keys(actual: Keys, expected: Keys) -> list[str]:
    found = [
        f"{stage} step {step}: other samples"
        for stage, step in expected
        if actual.get((stage, step)) != expected[stage, step]
    ]
    found += [f"{stage} step {step} was never to be trained" for stage, step in actual.keys() - expected.keys()]
    consumed = Counter((stage, key, position[1]) for (stage, _), rows in actual.items() for _, key, _, position in rows)
    return found + [f"{key} twice in epoch {epoch} of {stage}" for (stage, key, epoch), n in consumed.items() if n > 1]


def _leftovers(run: Run) -> list[str]:
    found = []
    deadline = time.monotonic() + ENDING_SECONDS
    while (alive := run.leftovers()) and time.monotonic() < deadline:
        time.sleep(0.2)
    found += [f"still alive: {line}" for line in alive]
    lease = read_lease(join(run.url, "lease.json"), run.store)
    found += [] if lease and lease.released else [f"the lease is not released: {lease}"]
    for attempt in run.attempts:
        by_itself = all(code is not None and code >= 0 for code in attempt.codes)
        left = number_of_files(run.folder / "tmp" / f"{attempt.number:02d}-rank") if by_itself else 0
        found += [f"attempt {attempt.number}: {left} temporary files"] if left else []
    for stage in STEPS:
        found += _stray_objects(run, stage)
    return found + _partial_files(run) + _open_uploads(run)


def _stray_objects(run: Run, stage: str) -> list[str]:
    """Name files in the checkpoints' folder that belong to no kept checkpoint."""
    folder = join(run.url, stage, "checkpoints")
    known = set()
    for saved in list_checkpoints(folder, run.store):
        known |= {join(saved.url, entry.name) for entry in saved.manifest.files} | {join(saved.url, "MANIFEST.json")}
    here = [info.url for files in list_step_dirs(folder, run.store).values() for info in files]
    return [f"stray object {url}" for url in here if url not in known]


def _partial_files(run: Run) -> list[str]:
    if run.schedule.s3:
        return []
    return [f"partial file {path}" for path in Path(run.url).rglob(".isthmus-*.partial")]


def _open_uploads(run: Run) -> list[str]:
    if not run.schedule.s3:
        return []
    import boto3

    config = run.store.config
    client = boto3.client("s3", endpoint_url=config.endpoint_url, region_name=config.region)
    uploads = client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
    prefix = run.url.removeprefix(f"s3://{BUCKET}/")
    return [f"unfinished upload of {u['Key']}" for u in uploads if u["Key"].startswith(prefix)]


def figures(run: Run) -> dict[str, float]:
    """Return what the disturbances cost: starts, repeated steps, the longest way back to training, goodput."""
    account = {}
    if run.attempts and run.attempts[-1].finished:
        account = json.loads(run.store.get(join(run.url, "goodput.json")))["seconds"]
    total = sum(account.values()) or 1.0
    return {
        "starts": len(run.attempts),
        "lost_steps": sum(record["rank"] == 0 for record in run.records()) - sum(STEPS.values()),
        "recovery_seconds": max(run.recoveries(), default=0.0),
        "seconds": run.attempts[-1].ended - run.attempts[0].began if run.attempts else 0.0,
        "goodput": (account.get("compute", 0.0) + account.get("data wait", 0.0)) / total,
    }
