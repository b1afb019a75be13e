"""Run the stages of the GPU check, most valuable first; each is a process with a time limit that writes its own JSON.

python -m benchmarks.gpu                            on the GPU host, in the repository's root
python -m benchmarks.gpu --tiny --out FOLDER        dry run of the logic, on a CPU too
python -m benchmarks.gpu --stages env,stage1_100    some of the stages
"""

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.gpu.stages import STAGES, Settings

LEAST_SECONDS = 25
ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def run_all(settings: Settings, wanted: list[str], budget_seconds: float) -> dict[str, Any]:
    """Run the wanted stages one after the other while the budget lasts; return and write `all.json`."""
    began, summary = time.monotonic(), {}
    for name in [name for name in STAGES if name in wanted]:
        left = budget_seconds - (time.monotonic() - began)
        if left < LEAST_SECONDS:
            summary[name] = {"state": "not started: the budget was used up"}
            continue
        summary[name] = _run_process(settings, name, left if settings.tiny else min(STAGES[name].limit_seconds, left))
        sys.stdout.write(f"{name} {json.dumps(summary[name])}\n")
        sys.stdout.flush()
    stages = {name: settings.read(name) for name in summary}
    found = {"summary": summary, "stages": stages}
    (settings.out / "all.json").write_text(json.dumps(found, indent=1))
    return found


def _run_process(settings: Settings, name: str, limit_seconds: float) -> dict[str, Any]:
    began = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.gpu", "--stage", name, *settings.flags()]
    settings.forget(name)
    try:
        done = subprocess.run(
            command,
            timeout=limit_seconds,
            env={**os.environ, **ENVIRONMENT},
            capture_output=True,
            text=True,
            check=False,
        )
        state, tail = f"exit {done.returncode}", (done.stderr or done.stdout)[-400:]
    except subprocess.TimeoutExpired:
        state, tail = f"stopped after {limit_seconds:.0f} s", ""
    found = settings.read(name)
    line = {"state": state, "wall_s": round(time.monotonic() - began, 1), **found.get("speed", {})}
    if state != "exit 0":
        line["error"] = found.get("error", tail)[-400:]
    return line


def run_one(settings: Settings, name: str) -> None:
    """Run one stage in this process; what it found before an error is kept beside the error."""
    try:
        settings.save(name, STAGES[name].run(settings, name))
    except BaseException:
        settings.save(name, {**settings.read(name), "error": traceback.format_exc()[-3000:]})
        raise


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".cache/gpu")), help="folder of results")
    parser.add_argument("--tiny", action="store_true", help="tiny models: the logic, not the speed")
    parser.add_argument("--budget", type=float, default=500.0, help="seconds for all stages")
    parser.add_argument("--stages", default=",".join(STAGES), help="comma-separated")
    parser.add_argument("--stage", help="run this stage in this process")
    options = parser.parse_args()
    settings = Settings(options.out, tiny=options.tiny)
    if options.stage:
        run_one(settings, options.stage)
    else:
        run_all(settings, options.stages.split(","), options.budget)


if __name__ == "__main__":
    main()
