"""The soak's result as a section of docs/reliability.md."""

import os
import platform
import statistics
import subprocess
from collections import Counter
from typing import Any

from tests.chaos.pipeline import ROOT

PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- last soak: begin -->", "<!-- last soak: end -->"
PACKAGES = ("model", "data_pipeline", "trainer", "cluster", "tests/chaos")


def commit() -> str:
    """Return the last commit that touched what a soak tests."""
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%h", "--", *PACKAGES]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


def section(results: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    if not results:
        return "No soak has been run for this commit."
    lines = [
        f"Commit {results[0]['commit']}, {results[-1]['date']}, {os.cpu_count()} cores ({platform.machine()}), shared.",
        "",
        "| | same world size | changing world size |",
        "|---|---|---|",
    ]
    groups = [[r for r in results if not r["elastic"]], [r for r in results if r["elastic"]]]
    rows: dict[str, Any] = {
        "schedules": len,
        "survived": lambda group: sum(r["survived"] for r in group),
        "faults that happened": lambda group: sum(r["happened"] for r in group),
        "starts of the run": lambda group: int(sum(r["starts"] for r in group)),
        "steps repeated (of 14 a run)": lambda group: int(sum(r["lost_steps"] for r in group)),
        "longest recovery, median / worst, s": _recovery,
        "goodput, median": lambda group: f"{statistics.median(r['goodput'] for r in group):.0%}",
    }
    for name, value in rows.items():
        cells = [str(value(group)) if group else "-" for group in groups]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    kinds = Counter(fault for result in results for fault in result["faults"])
    lines += ["", "Faults drawn: " + ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items())) + "."]
    failed = [result for result in results if not result["survived"]]
    lines += ["", "Not survived: " + ("none." if not failed else "")]
    for result in failed:
        name = f"{'e' if result['elastic'] else ''}{result['seed']}"
        lines.append(f"- `--seed {name}` ({', '.join(result['faults'])}): {result['problems'][0]}")
    return "\n".join(lines)


def _recovery(group: list[dict[str, Any]]) -> str:
    values = [r["recovery_seconds"] for r in group if r["starts"] > 1]
    return f"{statistics.median(values):.1f} / {max(values):.1f}" if values else "-"


def write(results: list[dict[str, Any]]) -> None:
    """Replace the section of the page."""
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{section(results)}\n{END}{after}")
