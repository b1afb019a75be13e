"""An animated SVG of `isthmus status --watch` through a killed worker, and of the demo's end.

`python -m isthmus.demo.recording docs/images/demo-tiny.svg` runs `make demo-tiny` and draws what a terminal shows.
"""

import io
import json
import os
import re
import secrets
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import Queue

from rich.console import Console
from rich.text import Text

from isthmus.demo.local_s3 import REGION
from isthmus.demo.machine import TINY_RECIPE
from isthmus.demo.main import CACHE

COLUMNS, ROWS = 100, 20
CHARACTER_WIDTH, LINE_HEIGHT, MARGIN = 12.2, 24.4, 20
FRAME_SECONDS, LAST_FRAME_SECONDS = 1.2, 8.0
POLL_SECONDS = 1.0
PARTS = "{styles}|||{matrix}"
"""Of rich's SVG template: the classes of colours, and the text."""


def main(out: str) -> int:
    """Run the demo, record it, write the SVG."""
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # one that both processes know
    command = [sys.executable, "-m", "isthmus.demo.main", TINY_RECIPE]
    demo = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: list[str] = []
    address: Queue[str] = Queue()

    def read() -> None:
        for line in demo.stdout or ():
            sys.stdout.write(line)
            lines.append(line.rstrip())
            if found := re.search(r"\$ isthmus submit .* run\.name=(\S+) --address (\S+)", line):
                address.put(" ".join(found.groups()))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    name, dashboard = address.get(timeout=600).split()
    frames = record_status(name, dashboard, demo)
    reader.join(timeout=600)
    frames.append("$ make demo-tiny\n" + "\n".join(lines[-ROWS + 2 :]))
    Path(out).write_text(animation(frames))
    return demo.wait(timeout=60)


def record_status(run: str, dashboard: str, demo: "subprocess.Popen[str]") -> list[str]:
    """Return each new output of `isthmus status RUN` until the run has ended."""
    keys = json.loads((CACHE / "s3" / "s3.json").read_text())["identities"][0]["credentials"][0]
    environment = {**os.environ, "AWS_ACCESS_KEY_ID": keys["accessKey"], "AWS_SECRET_ACCESS_KEY": keys["secretKey"]}
    environment |= {"AWS_REGION": REGION, "FORCE_COLOR": "1", "COLUMNS": str(COLUMNS)}
    command = [sys.executable, "-m", "isthmus.cluster.cli.main", "status", run, "--address", dashboard]
    frames: list[str] = []
    while demo.poll() is None:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        frame = f"$ isthmus status {run} --watch\n{done.stdout}"
        if done.returncode == 0 and frame not in frames[-1:]:
            frames.append(frame)
        if "finished" in done.stdout:
            break
        time.sleep(POLL_SECONDS)
    return frames


def animation(frames: list[str]) -> str:
    """Return an SVG that shows texts with ANSI colours one after the other, and the last one longer."""
    seconds = FRAME_SECONDS * (len(frames) - 1) + LAST_FRAME_SECONDS
    styles, groups = [], []
    for number, frame in enumerate(frames):
        begin = 100 * number * FRAME_SECONDS / seconds
        end = 100 * (number + 1) * FRAME_SECONDS / seconds if number < len(frames) - 1 else 100
        colours, matrix = drawn(frame, f"f{number}")
        styles.append(f"{colours}\n@keyframes k{number} {{ 0% {{ visibility: hidden }}")
        styles.append(f"{begin:.2f}% {{ visibility: visible }} {end:.2f}% {{ visibility: hidden }} }}")
        groups.append(f'<g class="frame" style="animation-name: k{number}">{matrix}</g>')
    width, height = COLUMNS * CHARACTER_WIDTH + 2 * MARGIN, ROWS * LINE_HEIGHT + 2 * MARGIN
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img"
  aria-label="isthmus status --watch while a worker is killed and the run recovers">
<style>
text {{ font: 20px ui-monospace, Menlo, Consolas, monospace; white-space: pre }}
.frame {{ visibility: hidden; animation: {seconds:.1f}s step-end infinite }}
.frame:last-child {{ visibility: visible }}
{chr(10).join(styles)}
</style>
<rect width="{width:.0f}" height="{height:.0f}" rx="8" fill="#292929"/>
<g transform="translate({MARGIN} {MARGIN})">
{chr(10).join(groups)}
</g>
</svg>
"""


def drawn(frame: str, identifier: str) -> tuple[str, str]:
    """Return rich's CSS and SVG text of one frame."""
    console = Console(record=True, width=COLUMNS, height=ROWS, file=io.StringIO(), force_terminal=True)
    for line in frame.splitlines()[:ROWS]:
        console.print(Text.from_ansi(line.rstrip()), no_wrap=True, overflow="ellipsis")
    styles, matrix = console.export_svg(code_format=PARTS, unique_id=identifier).split("|||")
    return styles, re.sub(r' clip-path="[^"]*"', "", matrix)


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
