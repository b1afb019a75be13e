"""Runs schedules against undisturbed runs: a few by number, or a long soak that goes on where it was."""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from cluster.local_s3 import local_s3
from tests.chaos import report
from tests.chaos.pipeline import BUCKET, ROOT, Place, Run
from tests.chaos.proxy import proxy
from tests.chaos.schedule import Schedule, draw
from tests.chaos.verify import Ending, ending, figures, problems

RESULTS = ROOT / ".cache" / "chaos" / "results.jsonl"
KEPT = ROOT / ".cache" / "chaos" / "failed"


class Campaign:
    """Runs schedules one after the other against undisturbed runs that are made once."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._expected: dict[bool, Ending] = {}

    def undisturbed(self, *, elastic: bool) -> Ending:
        """Return how a run ends to which nothing happens."""
        if elastic not in self._expected:
            worlds = (2, 1) if elastic else (2,)
            calm = Schedule(-1, (), s3=False, readers=0, cache=False, worlds=worlds)
            run = Run(self._place, calm, self._place.folder / f"calm-{elastic}", "calm")
            run.drive()
            if len(run.attempts) != 1 or not run.attempts[0].finished:
                raise RuntimeError(f"the undisturbed run failed: {run.attempts}; see {run.folder}/logs")
            self._expected[elastic] = ending(run)
        return self._expected[elastic]

    def go(self, seed: int, *, elastic: bool) -> dict[str, Any]:
        """Run a schedule; return what came of it."""
        schedule = draw(seed, elastic=elastic)
        expected = self.undisturbed(elastic=elastic)
        if schedule.s3:
            self._place.prepare_bucket()
        name = f"{'elastic' if elastic else 'seed'}-{seed}"
        run = Run(self._place, schedule, self._place.folder / name, name)
        began = time.monotonic()
        run.drive()
        found = problems(run, expected)
        result = {
            "seed": seed,
            "elastic": elastic,
            "survived": not found,
            "problems": found,
            "faults": [f"{fault.kind} {fault.point}".strip() for fault in schedule.faults],
            "happened": len(list(run.folder.glob("happened-*"))),
            "schedule": schedule.describe(),
            "codes": [attempt.codes for attempt in run.attempts],
            "wall_seconds": time.monotonic() - began,
            **figures(run),
        }
        if found:
            KEPT.mkdir(parents=True, exist_ok=True)
            shutil.copytree(run.folder, KEPT / name, dirs_exist_ok=True)
        shutil.rmtree(run.folder, ignore_errors=True)
        return result


@contextmanager
def campaign(*, s3: bool = True) -> Iterator[Campaign]:
    """Start what schedules need: assets, an S3 server behind a proxy, a process from which ranks are forked."""
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", TOKENIZERS_PARALLELISM="false")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the server is stopped
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.chaos.rank"])
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        place = Place(folder)
        if s3:
            place.server = stack.enter_context(local_s3(folder / "seaweed", BUCKET))
            port = int(place.server.endpoint_url.rsplit(":", 1)[1])
            place.proxy = stack.enter_context(proxy(port))
        place.prepare()
        yield Campaign(place)


def replay_command(result: dict[str, Any]) -> str:
    """Return the command that runs a schedule again."""
    return f"python -m tests.chaos.run --seed {'e' if result['elastic'] else ''}{result['seed']}"


def show(result: dict[str, Any]) -> None:
    """Print a schedule's result, and for a failure how to replay it."""
    word = "survived" if result["survived"] else "FAILED"
    place = "s3" if result["schedule"]["s3"] else "file"
    print(
        f"{word} seed {'e' if result['elastic'] else ''}{result['seed']} ({place}): "
        f"{', '.join(result['faults'])}; {result['happened']} happened; {result['starts']} starts, "
        f"{result['lost_steps']} steps repeated, {result['wall_seconds']:.0f} s, exit codes {result['codes']}"
    )
    for problem in result["problems"]:
        print(f"    {problem}")
    if not result["survived"]:
        print(f"    replay: {replay_command(result)}")
    sys.stdout.flush()


def done_before(commit: str) -> list[dict[str, Any]]:
    """Return the results of this commit's soak so far."""
    if not RESULTS.exists():
        return []
    return [r for line in RESULTS.read_text().splitlines() if (r := json.loads(line))["commit"] == commit]


def soak(wanted: list[tuple[int, bool]], seconds: float) -> int:
    """Run the schedules that have not been run for this commit yet, as long as there is time; return failures."""
    commit = report.commit()
    done = {(result["seed"], result["elastic"]) for result in done_before(commit)}
    left = [item for item in wanted if item not in done]
    print(f"{len(wanted) - len(left)} of {len(wanted)} schedules were run before; {len(left)} to go")
    failures, deadline = 0, time.monotonic() + seconds
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    if not left:
        return 0
    with campaign() as running:
        for seed, elastic in left:
            if time.monotonic() > deadline:
                break
            result = running.go(seed, elastic=elastic)
            show(result)
            failures += not result["survived"]
            line = {**result, "commit": commit, "date": time.strftime("%Y-%m-%d")}
            with RESULTS.open("a") as file:
                file.write(json.dumps(line) + "\n")
    return failures


def run_these(wanted: list[tuple[int, bool]], answer: Path | None) -> int:
    """Run schedules by number; return failures."""
    with campaign(s3=any(draw(seed, elastic=elastic).s3 for seed, elastic in wanted)) as running:
        results = []
        for seed, elastic in wanted:
            results.append(running.go(seed, elastic=elastic))
            show(results[-1])
    if answer:
        answer.write_text(json.dumps(results))
    return sum(not result["survived"] for result in results)


def main() -> int:
    """Run what the command line asks for; 1: a schedule was not survived."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.run", description=__doc__)
    parser.add_argument("--seed", nargs="*", default=[], help="run these and no others; e7: with changing world sizes")
    parser.add_argument("--schedules", type=int, default=0, help="length of the soak; a fifth is added as e0, e1, ...")
    parser.add_argument("--first", type=int, default=0, help="first seed of the soak")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin no schedule after this time")
    parser.add_argument("--json", type=Path, help="write the results of --seed there")
    parser.add_argument("--report", action="store_true", help="write the soak's result into docs/reliability.md")
    asked = parser.parse_args()
    failures = 0
    if asked.seed:
        failures = run_these([(int(seed.removeprefix("e")), seed.startswith("e")) for seed in asked.seed], asked.json)
    if asked.schedules:
        wanted: list[tuple[int, bool]] = []
        for seed in range(asked.first, asked.first + asked.schedules):
            wanted += [(seed, False), (seed // 5, True)] if seed % 5 == 0 else [(seed, False)]
        failures += soak(wanted, 60 * asked.minutes)
    if asked.report:
        latest = json.loads(RESULTS.read_text().splitlines()[-1])["commit"] if RESULTS.exists() else report.commit()
        report.write(done_before(latest))
    return 1 if failures else 0
