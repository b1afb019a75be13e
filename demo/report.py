"""The demo's report: the page of its run, with unseen concepts, reference curves and credits."""

import json
from pathlib import Path
from typing import Any

from isthmus.cluster.config import JobConfig
from isthmus.cluster.report.folder import read_folder
from isthmus.cluster.report.markup import Html, h, table
from isthmus.cluster.report.page import ReportExtras, render
from isthmus.data_pipeline.store.object_store import ObjectStore, join
from isthmus.demo.curves import load_band, verdict
from isthmus.demo.emoji import attributed_keys
from isthmus.demo.packages import EVERYTHING
from isthmus.demo.picture import write_picture

REPORT = "report.html"
PICTURE = "picture.svg"
BANDS = Path("docs/curves")
UNSEEN_CHANCE = "Chance at recall@k is k divided by the number of captions."


def write_report(config: JobConfig, store: ObjectStore, cache: Path, note: str | None = None) -> Path:
    """Write the report into the run's folder and the cache, beside it one picture and the curves; return the report.

    Args:
        config: of the run.
        store: that holds it.
        cache: local folder.
        note: what the generated scenes represent; None if the run uses real images.
    """
    url = join(config.run.url, config.run.name)
    facts = read_folder(url, store)
    sections = {
        "Unseen concepts": _unseen(cache),
        "Reference curves": h("p", verdict(load_band(_band_of(config.run.name)), facts)),
        "Credits": h("p", "Nothing was downloaded.") if note else credit_packages(),
    }
    extra = ReportExtras(sections=sections, warning=note)
    page = render(facts, extra).encode()
    store.put(join(url, REPORT), page)
    path = cache / REPORT
    ObjectStore().put(str(path), page)
    write_picture(facts, cache / PICTURE, () if note else attributed_keys(cache / "corpus"))
    _fetch_curves(url, store, cache / "tensorboard" / config.run.name)
    return path


def curve_verdict(config: JobConfig, store: ObjectStore) -> str:
    """Say whether the run learned what the committed reference runs did."""
    facts = read_folder(join(config.run.url, config.run.name), store)
    return verdict(load_band(_band_of(config.run.name)), facts)


def _band_of(run: str) -> Path:
    """Return the band of a run's recipe: later runs of `demo` are called demo-2, demo-3."""
    stem, _, number = run.rpartition("-")
    return BANDS / f"{stem if number.isdigit() else run}.json"


def _unseen(cache: Path) -> Html:
    """Return what `isthmus eval` measured on concepts that were never seen: cache/unseen/report.json."""
    file = cache / "unseen" / "report.json"
    if not file.exists():
        return h("p", "Nothing was measured on unseen concepts.", class_="missing")
    try:
        report: dict[str, Any] = json.loads(file.read_text())
        rows = [[name.removeprefix("eval/"), f"{value:.3f}"] for name, value in report["figures"].items()]
        note = f"{report['checkpoint']}. {UNSEEN_CHANCE}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return h("p", f"{file}: could not be read ({error})", class_="missing")
    return h("div", table(["measure", "value"], rows, "numbers"), h("p", note, class_="note"))


def credit_packages() -> Html:
    """Return a table of every package used, with version and licence."""
    rows = [[package.name, package.version, package.licence, package.role] for package in EVERYTHING]
    told = "Fetched from the package registries at run time, unchanged; nothing of them is redistributed."
    return h("div", h("p", told), table(["package", "version", "licence", "used for"], rows))


def _fetch_curves(url: str, store: ObjectStore, folder: Path) -> None:
    for stage in ("stage1", "stage2"):
        for info in store.list(join(url, stage, "tensorboard")):
            target = folder / stage / info.url.rpartition("/")[2]
            target.parent.mkdir(parents=True, exist_ok=True)
            store.download(info.url, target)
