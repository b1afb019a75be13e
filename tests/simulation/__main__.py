"""`python -m tests.simulation`: run schedules, replay and shrink one, or look for the mutants."""

import argparse
import json
import subprocess
import time
from collections import Counter
from pathlib import Path

from tests.simulation import faults, mutants, schedule

RECORD_EVERY = 500


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("--seed", type=int, help="replay this one, and shrink it if it fails")
    parser.add_argument("--first", type=int, default=0, help="first seed of a campaign")
    parser.add_argument("--schedules", type=int, default=1000, help="how many seeds")
    parser.add_argument("--kind", choices=list(faults.PLANS), help="only this kind; else drawn by the seed")
    parser.add_argument("--record", type=Path, help="file that says how far a campaign is")
    parser.add_argument("--mutants", action="store_true", help="look for the planted faults")
    arguments = parser.parse_args()
    with schedule.simulated():
        if arguments.seed is not None:
            return replay(arguments.seed, arguments.kind)
        if arguments.mutants:
            found = [mutants.hunt(mutant) for mutant in mutants.MUTANTS]
            print(mutants.table(found))
            return 0 if all(one.problem for one in found) else 1
        seeds = range(arguments.first, arguments.first + arguments.schedules)
        return campaign(seeds, arguments.kind, arguments.record)


def replay(seed: int, kind: str | None) -> int:
    """Run one schedule; if it fails, say with how few of its faults it still does."""
    plan, drawn = faults.draw(seed, kind)
    print(plan, *drawn, sep="\n")
    verdict = schedule.run(seed, plan, drawn)
    print(verdict)
    if verdict.problem is None:
        return 0
    fewer = schedule.shrink(seed, plan, drawn)
    print("still fails with:", *fewer, sep="\n  ")
    print(schedule.run(seed, plan, fewer).problem)
    return 1


def campaign(seeds: range, kind: str | None, record: Path | None) -> int:
    """Run many schedules; print those that fail and how many of each kind there were."""
    failed: list[int] = []
    counts, seconds, waits = Counter[str](), dict[str, float](), 0
    for seed in seeds:
        plan, drawn = faults.draw(seed, kind)
        began = time.process_time()
        verdict = schedule.run(seed, plan, drawn)
        counts[plan.kind] += 1
        seconds[plan.kind] = seconds.get(plan.kind, 0.0) + time.process_time() - began
        waits += verdict.num_waits
        if verdict.problem is not None:
            failed.append(seed)
            print(f"seed {seed} ({plan.kind}): {verdict.problem}", flush=True)
        if record is not None and (seed % RECORD_EVERY == 0 or seed == seeds[-1]):
            state = {"version": _version(), "seeds": [seeds[0], seed], "schedules": counts, "failed": failed}
            record.write_text(json.dumps(state | {"CPU seconds": sum(seconds.values()), "waits": waits}) + "\n")
    for name, number in counts.items():
        print(f"{name}: {number} schedules, {number / seconds[name]:.0f} a second")
    spent = sum(seconds.values())
    print(f"{len(seeds)} schedules, {len(seeds) / spent:.0f} a second, {waits / spent:.0f} waits a second")
    print(f"failed: {failed or 'none'}")
    return 1 if failed else 0


def _version() -> str:
    return subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()


if __name__ == "__main__":
    raise SystemExit(main())
