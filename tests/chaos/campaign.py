"""Runs schedules against undisturbed runs: a few by name, or a long soak that resumes where it was."""

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

from isthmus.demo.local_s3 import local_s3
from tests.chaos import report
from tests.chaos.pipeline import BUCKET, ROOT, Place, Run
from tests.chaos.proxy import proxy
from tests.chaos.schedule import ELASTIC, RAY, VERSION, Schedule, draw
from tests.chaos.verify import Ending, ending, figures, problems

KEPT = ROOT / ".cache" / "chaos" / "kept"


class Campaign:
    """Runs schedules one after the other against undisturbed runs that are made once."""

    def __init__(self, place: Place, *, keep: bool = False) -> None:
        self._place, self._keep = place, keep
        self._expected: dict[bool, Ending] = {}

    def undisturbed(self, *, elastic: bool) -> Ending:
        """Return how a run ends to which nothing happens. It is without Ray, also where Ray runs the disturbed one."""
        if elastic not in self._expected:
            worlds = (2, 1) if elastic else (2,)
            calm = Schedule(f"calm-{len(worlds)}", (), s3=False, readers=0, cache=False, worlds=worlds)
            run = Run(self._place, calm, self._place.folder / calm.name)
            run.drive()
            if len(run.attempts) != 1 or not run.attempts[0].finished:
                raise RuntimeError(f"the undisturbed run failed: {run.attempts}; see {run.folder}/logs")
            self._expected[elastic] = ending(run)
        return self._expected[elastic]

    def go(self, name: str) -> dict[str, Any]:
        """Run a schedule; return what came of it."""
        schedule = draw(name)
        expected = self.undisturbed(elastic=schedule.elastic)
        if schedule.s3:
            self._place.prepare_bucket()
        began = time.monotonic()
        run = self._run(schedule)
        run.drive()
        found = problems(run, expected)
        result = {
            "name": name,
            "survived": not found,
            "problems": found,
            "faults": [f"{fault.kind} {fault.point}".strip() for fault in schedule.faults],
            "happened": len(list(run.folder.glob("happened-*"))),
            "schedule": schedule.describe(),
            "codes": [attempt.codes for attempt in run.attempts],
            "wall_seconds": time.monotonic() - began,
            **figures(run),
        }
        if found or self._keep:
            shutil.rmtree(KEPT / name, ignore_errors=True)
            shutil.copytree(run.folder, KEPT / name, ignore_dangling_symlinks=True)
        shutil.rmtree(run.folder, ignore_errors=True)
        return result

    def _run(self, schedule: Schedule) -> Run:
        folder = self._place.folder / f"run-{schedule.name}"
        if not schedule.ray:
            return Run(self._place, schedule, folder)
        from tests.chaos.ray_run import RayRun  # Ray is imported where it is needed only

        return RayRun(self._place, schedule, folder)


@contextmanager
def campaign(names: list[str], *, keep: bool = False) -> Iterator[Campaign]:
    """Start what the schedules need: assets, a process from which ranks are forked, an S3 server, a proxy, Ray."""
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", TOKENIZERS_PARALLELISM="false")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the server is stopped
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.chaos.rank"])
    schedules = [draw(name) for name in names]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        place = Place(folder)
        if any(schedule.s3 for schedule in schedules):
            place.server = stack.enter_context(local_s3(folder / "seaweed", BUCKET))
            port = int(place.server.endpoint_url.rsplit(":", 1)[1])
            place.proxy = stack.enter_context(proxy(port))
        place.prepare()
        if any(schedule.ray for schedule in schedules):
            from tests.chaos.ray_run import cluster

            place.raylets = stack.enter_context(cluster())
        yield Campaign(place, keep=keep)


def replay_command(result: dict[str, Any]) -> str:
    """Return the command that runs a schedule again."""
    return f"python -m tests.chaos.run --seed {result['name']}"


def show(result: dict[str, Any]) -> None:
    """Print a schedule's result, and for a failure how to replay it."""
    word = "survived" if result["survived"] else "FAILED"
    place = "s3" if result["schedule"]["s3"] else "file"
    print(
        f"{word} seed {result['name']} ({place}): "
        f"{', '.join(result['faults'])}; {result['happened']} happened; {result['starts']} starts, "
        f"{result['lost_steps']} steps repeated, {result['wall_seconds']:.0f} s, exit codes {result['codes']}"
    )
    for problem in result["problems"]:
        print(f"    {problem}")
    if not result["survived"]:
        print(f"    replay: {replay_command(result)}")
    sys.stdout.flush()


def soak(wanted: list[str], seconds: float, *, older: bool) -> int:
    """Run the schedules that this code of the product has not seen, as long as there is time; return failures.

    `older`: a schedule that an older code of the product has survived counts as seen.
    """
    code, commit = report.code(), report.commit()
    done = {r["name"] for r in report.results() if r["code"] == code or (older and r["survived"])}
    left = [name for name in wanted if name not in done]
    print(f"{len(wanted) - len(left)} of {len(wanted)} schedules were run before; {len(left)} to go")
    failures, deadline = 0, time.monotonic() + seconds
    if not left:
        return 0
    with campaign(left) as running:
        for name in left:
            if time.monotonic() > deadline:
                break
            result = running.go(name)
            show(result)
            failures += not result["survived"]
            report.keep({**result, "version": VERSION, "code": code, "commit": commit})
    return failures


def run_these(names: list[str], answer: Path | None, *, keep: bool) -> int:
    """Run schedules by name; return failures."""
    results = []
    with campaign(names, keep=keep) as running:
        for name in names:
            results.append(running.go(name))
            show(results[-1])
    if answer:
        answer.write_text(json.dumps(results))
    return sum(not result["survived"] for result in results)


def soak_of(length: int) -> list[str]:
    """Return the names of a soak: 0, 1, ..., and a fifth as many each with changing world sizes and under Ray."""
    names: list[str] = []
    for seed in range(length):
        names += [str(seed), f"{ELASTIC}{seed // 5}", f"{RAY}{seed // 5}"] if seed % 5 == 0 else [str(seed)]
    return names


def main() -> int:
    """Run what the command line asks for; 1: a schedule was not survived."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.run", description=__doc__)
    parser.add_argument("--seed", nargs="*", default=[], help="run these and no others: 7, e7 (elastic), r7 (Ray)")
    parser.add_argument("--schedules", type=int, default=0, help="length of the soak; elastic ones and Ray are added")
    parser.add_argument("--only", choices=("plain", "ray"), help="of the soak: those without Ray, or under Ray")
    parser.add_argument("--share", default="0/1", help="1/2: every second one of the soak, beside another process")
    parser.add_argument("--older", action="store_true", help="of the soak: do not repeat what older code has survived")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin no schedule after this time")
    parser.add_argument("--json", type=Path, help="write the results of --seed there")
    parser.add_argument("--keep", action="store_true", help="keep logs and folders of survivors, too")
    parser.add_argument("--report", action="store_true", help="write the soak's result into docs/reliability.md")
    asked = parser.parse_args()
    failures = 0
    if asked.seed:
        failures = run_these(asked.seed, asked.json, keep=asked.keep)
    if asked.schedules:
        index, of = map(int, asked.share.split("/"))
        wanted = [name for name in soak_of(asked.schedules) if asked.only in (None, _layer(name))]
        failures += soak(wanted[index::of], 60 * asked.minutes, older=asked.older)
    if asked.report:
        report.write()
    return 1 if failures else 0


def _layer(name: str) -> str:
    return "ray" if draw(name).ray else "plain"
