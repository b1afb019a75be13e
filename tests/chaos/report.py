"""Results of soaks, kept from part to part, and the section of docs/reliability.md that is made of them."""

import hashlib
import json
import os
import platform
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from tests.chaos.pipeline import ROOT
from tests.chaos.schedule import ELASTIC, RAY, VERSION

RESULTS = ROOT / ".cache" / "chaos" / "results.jsonl"
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- last soak: begin -->", "<!-- last soak: end -->"
PACKAGES = ("model", "data_pipeline", "trainer", "cluster", "ds_configs")

Result = dict[str, Any]


def code() -> str:
    """Return a hash over the product's files as they are here: results are bound to it, not to a commit."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*")):
            if path.suffix in (".py", ".json"):
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def commit() -> str:
    """Return the last commit that touched the product; with a + where files differ from it."""
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%h", "--", *PACKAGES]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    changed = subprocess.run(["git", "-C", str(ROOT), "diff", "--quiet", "HEAD", "--", *PACKAGES], check=False)
    return found + ("+" if changed.returncode else "")


def keep(result: Result) -> None:
    """Add a result to those of earlier parts."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps({**result, "date": time.strftime("%Y-%m-%d")}) + "\n")


def results() -> list[Result]:
    """Return all results of this version of the schedules, oldest first."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return [result for line in lines if (result := json.loads(line))["version"] == VERSION]


def write() -> None:
    """Replace the section of the page."""
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{section(results())}\n{END}{after}")


def section(found: list[Result]) -> str:
    """Return results as Markdown: the newest of each schedule, by commit, and every failure."""
    if not found:
        return "No soak has been run."
    newest = {result["name"]: result for result in found}
    layers = [
        [result for name, result in newest.items() if name.rstrip("0123456789") == letter]
        for letter in ("", ELASTIC, RAY)
    ]
    lines = [
        f"{found[-1]['date']}, {os.cpu_count()} cores ({platform.machine()}), shared; newest run of each schedule.",
        "",
        *_table(layers),
        "",
        "By commit of the product: " + "; ".join(_by_commit(list(newest.values()))) + ".",
        "",
        "Faults drawn: " + ", ".join(_drawn(list(newest.values()))) + ".",
        "",
        *_failures(found, newest),
    ]
    return "\n".join(lines)


def _table(layers: list[list[Result]]) -> list[str]:
    rows: dict[str, Callable[[list[Result]], Any]] = {
        "schedules": len,
        "survived": lambda group: sum(r["survived"] for r in group),
        "faults injected": lambda group: sum(r["happened"] for r in group),
        "starts of the run": lambda group: sum(r["starts"] for r in group),
        "steps repeated (of 14 per run)": lambda group: sum(r["lost_steps"] for r in group),
        "longest recovery, median / worst, s": _recovery,
        "goodput, median": lambda group: f"{statistics.median(r['goodput'] for r in group):.0%}",
        "wall time of a schedule, median, s": lambda group: (
            f"{statistics.median(r['wall_seconds'] for r in group):.0f}"
        ),
    }
    lines = ["| | same world size | changing world size | under Ray |", "|---|---|---|---|"]
    for name, value in rows.items():
        lines.append(f"| {name} | " + " | ".join(str(value(group)) if group else "-" for group in layers) + " |")
    return lines


def _recovery(group: list[Result]) -> str:
    values = [r["recovery_seconds"] for r in group if r["recovery_seconds"]]
    return f"{statistics.median(values):.1f} / {max(values):.1f}" if values else "-"


def _by_commit(group: list[Result]) -> list[str]:
    counts = Counter(result["commit"] for result in group)
    return [f"{name} {number}" for name, number in counts.items()]


def _drawn(group: list[Result]) -> list[str]:
    counts = Counter(fault for result in group for fault in result["faults"])
    return [f"{fault} {number}" for fault, number in sorted(counts.items())]


def _failures(found: list[Result], newest: dict[str, Result]) -> list[str]:
    failed = [result for result in found if not result["survived"]]
    if not failed:
        return ["No failures."]
    lines = ["Failures, including those that passed later:"]
    for result in failed:
        later = newest[result["name"]]
        then = f"survived at {later['commit']}" if later["survived"] else "still fails"
        faults = ", ".join(result["faults"])
        lines.append(f"- `--seed {result['name']}` at {result['commit']} ({faults}): {result['problems'][0]}; {then}")
    return lines
