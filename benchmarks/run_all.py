"""Runs all benchmarks and writes benchmarks/results/<date>.json and .md: ours, each peer, ratio, machine, command.

    python -m benchmarks.run_all [--quick] [--only NAME ...]      (or: make bench)

Every benchmark is a process of its own with a time limit; one that fails is reported and the others run. What they
print in full goes to .cache/bench-output.txt. Peers from PyPI live in an environment of their own (peers.py).
--quick takes smaller sizes, leaves out what has none, and says so in the file's name.
"""

import argparse
import datetime
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import peers

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OUTPUT = ROOT / ".cache" / "bench-output.txt"
LIMIT_SECONDS = 3600
VERSIONS = ("torch", "deepspeed", "ray", "transformers", "numpy")

logger = logging.getLogger("bench")


@dataclass(frozen=True)
class Figure:
    """One line of the table; `unit` is a cost, so a ratio above 1 is in our favour."""

    what: str
    unit: str
    ours: float
    peer: str = ""
    theirs: float | None = None

    @property
    def ratio(self) -> float | None:
        """Theirs over ours."""
        return self.theirs / self.ours if self.theirs is not None and self.ours else None


Extract = Callable[[str], Iterator[Figure]]


@dataclass(frozen=True)
class Benchmark:
    """A module of benchmarks/ and how to read what it prints."""

    module: str
    extract: Extract
    arguments: list[str] = field(default_factory=list)
    quick: list[str] | None = None
    """Arguments of a small run; None if there is none."""


def objects(text: str) -> list[Any]:
    """Return all JSON values in a text, in order; what is no JSON is skipped."""
    decoder, found, at = json.JSONDecoder(), [], 0
    while (match := re.compile(r"^[{\[]", re.MULTILINE).search(text, at)) is not None:
        try:
            value, at = decoder.raw_decode(text, match.start())
            found.append(value)
        except json.JSONDecodeError:
            at = match.end()
    return found


def rows(text: str) -> Iterator[list[str]]:
    """Return the cells of a Markdown table's rows."""
    for line in text.splitlines():
        if line.startswith("|") and not line.startswith("|---"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def checkpoint(text: str) -> Iterator[Figure]:
    """Time for which training stops."""
    stalls = {row["what"]: row["stall_s"] for row in objects(text) if "stall_s" in row}
    ours = stalls["ours, disk: save 2"]
    for peer in ("torch.save", "torch.distributed.checkpoint"):
        yield Figure("save: training stops for", "s", ours, peer, stalls[f"{peer}: save"])
    if "ours, S3 on loopback: save 2" in stalls:
        yield Figure("save to S3: training stops for", "s", stalls["ours, S3 on loopback: save 2"])


def throughput(text: str) -> Iterator[Figure]:
    """CPU per sample beside other pipelines."""
    cells = [row for row in rows(text) if row[0] != "pipeline"]
    ours = float(cells[0][1])
    for row in cells[1:]:
        yield Figure(f"read and decode, {cells[0][0]}", "CPU ms per sample", ours, row[0], float(row[1]))


def layer_reading(text: str) -> Iterator[Figure]:
    """Reading with a caption layer and without."""
    plain, layered = map(float, re.findall(r"([\d.]+) with", text))
    yield Figure("read and decode, with a caption layer", "CPU ms per sample", layered, "without a layer", plain)


def selection(text: str) -> Iterator[Figure]:
    """Selecting from a caption layer."""
    num_samples, seconds = re.findall(r"of (\d+) samples in ([\d.]+) s", text)[0]
    yield Figure(f"select captions of {num_samples} samples", "s wall", float(seconds))
    yield Figure("layer of five candidates", "bytes per sample", float(re.findall(r"candidates: (\d+)", text)[0]))


def resume(text: str) -> Iterator[Figure]:
    """First batch after a seek, and what memory grows by."""
    found = {row[0]: row for row in rows(text)}
    for place in ("middle of epoch 0", "middle of epoch 1000"):
        for column, unit in ((1, "ms wall"), (2, "CPU ms")):
            ours, start = float(found[place][column]), float(found["step 0"][column])
            yield Figure(f"first batch at {place}", unit, ours, "first batch at step 0", start)
    resident = [float(size) for size in text.partition("epochs: ")[2].splitlines()[0].split()]
    yield Figure(f"memory after epoch {len(resident)}", "MiB", resident[-1], "after epoch 1", resident[0])


def order(text: str) -> Iterator[Figure]:
    """Planning a billion samples, and how well the order shuffles."""
    cells = list(rows(text))
    for row in cells:
        seconds = re.match(r"([\d.]+) CPU s", row[1])
        if seconds:
            yield Figure(f"plan 1B samples, {row[0]}", "CPU s", float(seconds[1]))
    shared = {row[0]: float(row[5]) for row in cells if len(row) == 6 and row[0] != "K"}
    for window in ("4", "64"):
        what = f"samples that share a chunk with another of their batch, K = {window}"
        yield Figure(what, "share", shared[window], "uniform permutation", shared["uniform"])


def frozen(text: str) -> Iterator[Figure]:
    """Loading a sharded frozen model."""
    result = objects(text)[0]
    for unit, key in (("CPU s, both ranks", "CPU seconds"), ("MB per rank", "anonymous peak MB")):
        ours, theirs = (sum(rank[key] for rank in result[name]) for name in ("own", "from_pretrained"))
        ranks = 1 if key == "CPU seconds" else 2
        yield Figure("load a frozen model of 1 GB", unit, ours / ranks, "from_pretrained under ZeRO-3", theirs / ranks)


def layout(text: str) -> Iterator[Figure]:
    """Two engines against one."""
    result = objects(text)[0]
    for key in ("CPU seconds per step", "collectives per step"):
        two, one = (result[name][0][key] for name in ("two engines", "one"))
        yield Figure("stage-2 step on two ranks", key, two, "one ZeRO-3 engine", one)


def virtual(text: str) -> Iterator[Figure]:
    """Sums in a fixed order against the ordinary reduction."""
    for row in objects(text):
        place = f"step of {row['recipe']}, {row['ranks']} ranks, {row['virtual ranks']} virtual ranks"
        ours, theirs = (row[way]["CPU seconds"] for way in ("tree", "ordinary"))
        yield Figure(place, "CPU s", ours, "each rank its own rows, reduced by DeepSpeed", theirs)


def group_start(text: str) -> Iterator[Figure]:
    """Start of a worker group."""
    found = {
        name: (float(wall), float(cpu)) for name, wall, cpu in re.findall(r"(\w+) +([\d.]+) s wall +([\d.]+)", text)
    }
    for i, unit in enumerate(("s wall", "CPU s")):
        yield Figure(
            "start of two workers", unit, found["actors"][i], "Ray Train TorchTrainer", found["TorchTrainer"][i]
        )


def recovery(text: str) -> Iterator[Figure]:
    """From a kill to the next step."""
    seconds = [float(value) for value in re.findall(r"kill to next step ([\d.]+) s", text)]
    yield Figure(f"recovery after SIGKILL, mean of {len(seconds)}", "s wall", sum(seconds) / len(seconds))


def stage1(text: str) -> Iterator[Figure]:
    """The fast path beside the plain one."""
    found = dict(re.findall(r"^(plain|fast) +([\d.]+) CPU s", text, re.MULTILINE))
    yield Figure("stage-1 step, 8 pairs", "CPU s", float(found["fast"]), "plain path", float(found["plain"]))


def original(text: str) -> Iterator[Figure]:
    """The fast path beside the original code, both with dropout."""
    found = dict(re.findall(r"^(original|ours) ([\d.]+) CPU s", text, re.MULTILINE))
    ours, theirs = float(found["ours"]), float(found["original"])
    yield Figure("stage-1 step with dropout, 8 pairs", "CPU s", ours, "salesforce-lavis 1.0.2", theirs)


def stage2(text: str) -> Iterator[Figure]:
    """Beside transformers."""
    for result in objects(text):
        cpu = result["cpu_seconds"]
        name = f"stage-2 step, {result['language_model']}"
        yield Figure(name, "CPU s", cpu["ours"], "transformers Blip2ForConditionalGeneration", cpu["transformers"])


def scale_plan(text: str) -> Iterator[Figure]:
    """Planning at scale."""
    for row in objects(text)[0]["plan"]:
        yield Figure(f"plan {row['samples']} samples, rank 0 of {row['ranks']}", "CPU s", row["plan CPU s"])


def scale_driver(text: str) -> Iterator[Figure]:
    """The driver's own work."""
    for row in objects(text)[0]["driver"]:
        yield Figure(f"driver, {row['workers']} stand-in workers", "CPU ms per second", row["CPU ms per second"])


def scale_spot(text: str) -> Iterator[Figure]:
    """Share of a month lost."""
    for name, row in objects(text)[0].items():
        if isinstance(row, dict):
            lost = 1 - row["goodput at Young-Daly"]
            yield Figure(f"month on spot, {name}", "share lost", lost, "saving hourly", 1 - row["goodput at 1 hour"])


def scale_month(text: str) -> Iterator[Figure]:
    """Share of a month lost by the real driver under a simulated clock."""
    row = objects(text)[0]
    expected = 1 - row["goodput of the event simulation"]
    yield Figure("month on spot, the real driver", "share lost", 1 - row["goodput"], "event simulation", expected)


def truth(text: str) -> Iterator[Figure]:
    """Predicted and measured step time."""
    for row in objects(text)[0]["steps"]:
        yield Figure(f"step time, {row['what']}", "predicted / measured", row["predicted / measured"])


def benchmarks(assets: Path) -> list[Benchmark]:
    """Return all of them, cheap ones first."""
    peer = ["--peer-python", str(peers.FOLDER / "bin" / "python")]
    return [
        Benchmark("scale.spot", scale_spot, [], ["--quick"]),
        Benchmark("scale.driver", scale_driver, [], ["--quick"]),
        Benchmark("scale.month", scale_month, [], ["--days", "2"]),
        Benchmark("scale.plan", scale_plan, [], ["--quick"]),
        Benchmark("estimate_truth", truth, [], ["--quick"]),
        Benchmark("data_order", order),
        Benchmark(
            "data_throughput", throughput, [*peer, "--rounds", "3"], [*peer, "--samples", "128", "--rounds", "1"]
        ),
        Benchmark("data_throughput", throughput, [*peer, "--rounds", "2", "--s3"]),
        Benchmark("caption_layers", layer_reading, ["read"], ["read", "--samples", "256", "--rounds", "1"]),
        Benchmark("caption_layers", selection, ["select"], ["select", "--samples", "50000"]),
        Benchmark("data_resume", resume),
        Benchmark("checkpoint", checkpoint, [], ["--no-s3", "--parameters", "10000000"]),
        Benchmark("stage1_speed", stage1),
        Benchmark("stage1_original", original),
        Benchmark("stage2_speed", stage2),
        Benchmark("engine_layout", layout),
        Benchmark("virtual_ranks", virtual, [], ["--recipe", "tiny", "--ranks", "2"]),
        Benchmark("frozen_load", frozen),
        Benchmark("group_start", group_start, ["--rounds", "3"]),
        Benchmark("recovery", recovery, [str(assets)]),
    ]


def make_assets(folder: Path) -> None:
    """Make the tiny data set and models that the recovery benchmark trains."""
    if not (folder / "train").exists():
        command = [sys.executable, "-m", "isthmus.cluster.cli.main", "assets", "tiny", str(folder)]
        subprocess.run(command, check=True, cwd=ROOT, timeout=LIMIT_SECONDS)


def run(benchmark: Benchmark, arguments: list[str]) -> dict[str, Any]:
    """Run one benchmark; return its figures, or what went wrong."""
    command = [sys.executable, "-m", f"benchmarks.{benchmark.module}", *arguments]
    shown = " ".join(["python", *(arg.replace(f"{ROOT}/", "") for arg in command[1:])])
    logger.info("%s", shown)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    began, before = time.monotonic(), os.times()
    result: dict[str, Any] = {"command": shown, "figures": []}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=True
        )
        with OUTPUT.open("a") as file:
            file.write(f"$ {shown}\n{done.stdout}\n")
        result["figures"] = [asdict(figure) | {"ratio": figure.ratio} for figure in benchmark.extract(done.stdout)]
        if not result["figures"]:
            result["error"] = "printed no figure that could be read"
    except subprocess.CalledProcessError as error:
        result["error"] = (error.stderr.strip().splitlines() or ["no message"])[-1]
    except (subprocess.TimeoutExpired, LookupError, ValueError) as error:
        result["error"] = f"{type(error).__name__}: {error}"
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return result | {
        "wall seconds": round(time.monotonic() - began, 1),
        "CPU seconds": round(cpu, 1),
        "load average": round(os.getloadavg()[0], 1),
    }


def machine() -> dict[str, Any]:
    """Return what the figures were measured on and with."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "load average": round(os.getloadavg()[0], 1),
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in VERSIONS},
        "peers": dict(line.split("==") for line in peers.REQUIREMENTS.read_text().splitlines() if "==" in line),
    }


def table(result: dict[str, Any]) -> str:
    """Return the run as Markdown."""
    facts = result["machine"]
    versions, peers = (
        ", ".join(f"{name} {number}" for name, number in facts[kind].items()) for kind in ("versions", "peers")
    )
    seconds, cpu = (sum(entry[f"{kind} seconds"] for entry in result["benchmarks"]) for kind in ("wall", "CPU"))
    loads = [entry["load average"] for entry in result["benchmarks"]]
    lines = [
        f"# Benchmarks of {result['date']}{' (quick: reduced sizes)' if result['quick'] else ''}",
        "",
        f"{facts['cpu']}, {facts['cores']} cores; {versions}; peers: {peers}.",
        f"{seconds / 60:.0f} minutes, {cpu / 60:.0f} CPU minutes; load average {facts['load average']} before, "
        f"{min(loads)} to {max(loads)} after each benchmark.",
        "Where there is a peer the unit is a cost: a ratio (peer / ours) above 1 is in our favour.",
        "",
        "| what | unit | ours | peer | peer's | ratio | command |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in result["benchmarks"]:
        for figure in entry["figures"]:
            theirs, ratio = (f"{v:.3g}" if v is not None else "" for v in (figure["theirs"], figure["ratio"]))
            cells = [figure["what"], figure["unit"], f"{figure['ours']:.3g}", figure["peer"], theirs, ratio]
            lines.append("| " + " | ".join([*cells, f"`{entry['command']}`"]) + " |")
    failed = [f"- `{entry['command']}`: {entry['error']}" for entry in result["benchmarks"] if "error" in entry]
    lines += ["", "Failed:", *failed] if failed else []
    lines += ["", f"Left out: {', '.join(result['left out'])}."] if result["left out"] else []
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run, write both files, print the table; 1 where a benchmark failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="reduced sizes")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these modules")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    assets = ROOT / ".cache" / "bench-assets"
    known = benchmarks(assets)
    unknown = sorted(set(options.only) - {benchmark.module for benchmark in known})
    if unknown:
        parser.error(f"--only {unknown[0]}: known are {', '.join(benchmark.module for benchmark in known)}")
    chosen = [b for b in known if (not options.only or b.module in options.only)]
    runnable = [b for b in chosen if not options.quick or b.quick is not None]
    if any(b.module == "data_throughput" for b in runnable):
        peers.make_environment()
    if any(b.module == "recovery" for b in runnable):
        make_assets(assets)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    result: dict[str, Any] = {"date": date, "quick": options.quick, "machine": machine()}
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text("")
    result |= {"benchmarks": [], "left out": sorted({b.module for b in known if b not in runnable})}
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / f"{date}{'-quick' if options.quick else ''}"
    for benchmark in runnable:
        reduced = options.quick and benchmark.quick is not None
        result["benchmarks"].append(run(benchmark, benchmark.quick if reduced else benchmark.arguments))
        stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        stem.with_suffix(".md").write_text(table(result))
    sys.stdout.write(table(result))
    return 1 if any("error" in entry for entry in result["benchmarks"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
