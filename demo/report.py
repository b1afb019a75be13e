"""The demo's report: the page of its run, with what simpler ways reach, unseen concepts, reference curves, credits."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isthmus.cluster.config import JobConfig
from isthmus.cluster.report.folder import read_folder
from isthmus.cluster.report.markup import Html, h, table
from isthmus.cluster.report.measures import Baseline
from isthmus.cluster.report.page import ReportExtras, render
from isthmus.data_pipeline.store.object_store import ObjectStore, join
from isthmus.demo.curves import load_band, verdict
from isthmus.demo.packages import EVERYTHING
from isthmus.demo.picture import write_picture

REPORT = "report.html"
PICTURE = "picture.svg"
BANDS = Path("docs/curves")
PLAIN = "pooled features, MLP to frozen MiniLM (6,000 pairs, 648 captions)"
BASELINES = {
    "eval/i2t_r1": [Baseline(PLAIN, 0.375)],
    "eval/i2t_r5": [Baseline(PLAIN, 0.597)],
    "eval/i2t_r10": [Baseline(PLAIN, 0.659)],
}
UNSEEN_BASELINES = {"i2t_r1": 0.270, "i2t_r5": 0.463, "i2t_r10": 0.568}
UNSEEN_CHANCE = "Chance at recall@k is k divided by the number of captions."
UNSEEN_BASELINE = (
    "The simple baseline, pooled features and an MLP to frozen MiniLM, chose among 206 different captions; here each "
    "drawing brings its caption, so one wrong name may take several places, which is harder at 5 and 10."
)


def write_report(config: JobConfig, store: ObjectStore, cache: Path, note: str | None = None) -> Path:
    """Write the report into the run's folder and the cache, beside it one picture and the curves; return the report.

    Args:
        config: of the run.
        store: that holds it.
        cache: local folder.
        note: what generated scenes stand for; none: the run is on the real pictures.
    """
    url = join(config.run.url, config.run.name)
    facts = read_folder(url, store)
    extra = ReportExtras(
        {} if note else BASELINES,
        {
            "Unseen concepts": _unseen(cache, {} if note else UNSEEN_BASELINES),
            "Reference curves": h("p", verdict(load_band(_band_of(config.run.name)), facts)),
            "Credits": h("p", "Nothing was downloaded.") if note else credit_packages(),
        },
        note,
    )
    page = render(facts, extra).encode()
    store.put(join(url, REPORT), page)
    path = cache / REPORT
    ObjectStore().put(str(path), page)
    write_picture(facts, cache / PICTURE)
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


def _unseen(cache: Path, baselines: Mapping[str, float]) -> Html:
    """Return what `isthmus eval` measured on concepts that were never seen: cache/unseen*/report.json."""
    files = sorted(cache.glob("unseen*/report.json"))
    rows = [row for file in files for row in _rows(file, baselines)]
    if not rows:
        return h("p", "Nothing was measured on unseen concepts.", class_="missing")
    header = ["measure", "value", "simple baseline", "of"]
    notes = [UNSEEN_CHANCE, UNSEEN_BASELINE] if baselines else [UNSEEN_CHANCE]
    return h("div", table(header, rows, "numbers"), h("p", " ".join(notes), class_="note"))


def _rows(file: Path, baselines: Mapping[str, float]) -> list[list[str]]:
    try:
        report: dict[str, Any] = json.loads(file.read_text())
        figures = {name.removeprefix("eval/"): value for name, value in report["figures"].items()}
        return [
            [name, f"{value:.3f}", f"{baselines[name]:.3f}" if name in baselines else "", str(report["checkpoint"])]
            for name, value in figures.items()
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [[str(file), "could not be read", "", str(error)]]


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
