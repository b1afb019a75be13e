"""The report in a browser: opened from disk, every picture drawn, a silent console, readable on a phone."""

import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from isthmus.cluster.report import write_report
from isthmus.data_pipeline.store.object_store import ObjectStore
from tests.run_folder import local_run

BROWSER = shutil.which("chromium")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine; apt-get install chromium"),
]
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars --disable-component-update "
    "--disable-background-networking --disable-sync --enable-logging=stderr --v=0 --virtual-time-budget=5000"
)
PROBE = """<script>
const images = [...document.images];
const facts = {images: images.length, drawn: images.filter(i => i.complete && i.naturalWidth > 0).length,
  title: document.title, overflow: document.documentElement.scrollWidth - window.innerWidth,
  charts: document.querySelectorAll("svg polyline").length};
console.log("PROBE " + JSON.stringify(facts) + " END");
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    _, url = local_run(folder / "runs")
    return write_report(url, ObjectStore(), folder / "report.html")


def browse(page: Path, *arguments: str) -> str:
    """Open a page without a network and return what the browser said, console included."""
    assert BROWSER is not None
    profile = page.parent / "profile"
    flags = [*FLAGS.split(), "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}"]
    command = [BROWSER, *flags, *arguments, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    shutil.rmtree(profile, ignore_errors=True)
    return done.stderr


def console(said: str) -> list[str]:
    return [line for line in said.splitlines() if ":CONSOLE" in line]


def test_a_screenshot_shows_the_pictures_and_the_console_is_silent(page, tmp_path):
    shot = tmp_path / "shot.png"
    said = browse(page, "--window-size=1000,5400", f"--screenshot={shot}")
    assert console(said) == []
    pixels = np.asarray(Image.open(io.BytesIO(shot.read_bytes())).convert("RGB"))
    assert pixels.shape[:2] == (5400, 1000)
    for shade in (90, 150):  # thumbnails of the samples, and a drawing; text has no such areas
        area = (np.abs(pixels.astype(int) - shade).max(axis=2) <= 2).sum()
        assert area > 2000, f"no picture of shade {shade}"


@pytest.mark.parametrize("width", [1000, 390])
def test_every_picture_loads_and_nothing_sticks_out(page, tmp_path, width):
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("</body>", f"{PROBE}</body>"))
    holder = tmp_path / "holder.html"  # a window has a least width, a frame has none
    holder.write_text(f'<iframe src="{probed.name}" width="{width}" height="900" style="border:0"></iframe>')
    said = browse(holder, "--window-size=1200,1000", "--dump-dom")
    found = re.search(r"PROBE (\{.*\}) END", "\n".join(console(said)).replace('\\"', '"'))
    assert found, said
    facts = json.loads(found[1])
    assert facts["images"] == facts["drawn"] == 24
    assert facts["charts"] == 6  # lines of the charts
    assert facts["overflow"] <= 0
    assert facts["title"] == "demo: isthmus run"
    assert len(console(said)) == 1
