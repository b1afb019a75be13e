"""The report of a bootstrap: one HTML file from its folder."""

import time

import numpy as np

from isthmus.bootstrap.caption import NOT_CAPTIONED
from isthmus.bootstrap.summary import Shown, Summary, summarize
from isthmus.cluster.report.charts import line_chart
from isthmus.cluster.report.markup import Html, document, h, join, picture, table
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.trainer.evaluation.result import thumbnail

REPORT = "report.html"
BINS = 30
LEFT_OUT, CANDIDATES, CHOSEN = "left out: ", "candidates: ", "chosen: "
"""How the selection names its counts."""
KEPT = {True: "kept", False: "dropped"}


def write_bootstrap_report(url: str, store: ObjectStore, out: str) -> str:
    """Write the report of a bootstrap's folder to a path or URL, replacing it; return `out`.

    Raises:
        DataError: nothing is selected yet, or the store refuses access.
    """
    store.put(out, render_bootstrap(summarize(url, store)).encode())
    return out


def render_bootstrap(found: Summary) -> str:
    """Return the page."""
    read = "" if found.shards_read == found.total_shards else f", figures from {found.shards_read} of them"
    written = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    lead = f"{found.url} · {found.total_shards} shards{read} · written {written} UTC"
    name = found.url.rstrip("/").rpartition("/")[2]
    sections = {
        "Acceptance": _acceptance(found),
        "Scores": _scores(found),
        "Kept": _gallery(found, kept=True),
        "Dropped": _gallery(found, kept=False),
        "Time and cost": _times(found),
    }
    return document(f"{name}: bootstrapped captions", h("header", h("h1", name), h("p", lead, class_="lead")), sections)


def _acceptance(found: Summary) -> Html:
    """Return what was captioned, what was selected, and which share of the texts of each source was kept."""
    total, counts = found.captioned["images"], found.selected
    lost = {name: count for name, count in found.captioned.items() if name.startswith(NOT_CAPTIONED)}
    left_out = {name: count for name, count in counts.items() if name.startswith(LEFT_OUT)}
    stages = {"captioned": total - sum(lost.values()), **lost, "selected": counts["kept"], **left_out}
    sources = [name.removeprefix(CANDIDATES) for name in counts if name.startswith(CANDIDATES)]
    texts = [
        [source, *_share(counts.get(f"{CHOSEN}{source}", 0), counts[f"{CANDIDATES}{source}"])] for source in sources
    ]
    return join(
        table(
            ["images", "number", "of", "share"], [[name, *_share(n, total)] for name, n in stages.items()], "numbers"
        ),
        table(["texts from", "kept", "of", "share"], texts, "numbers"),
    )


def _share(part: int, whole: int) -> list[str]:
    return [f"{part:,}", f"{whole:,}", f"{part / whole:.1%}" if whole else ""]


def _scores(found: Summary) -> Html:
    """Return a histogram per score: kept and dropped texts of each source, all with the same bins."""
    charts = []
    for name, by_kind in found.scores.items():
        values = np.concatenate([np.asarray(some) for some in by_kind.values()])
        edges = np.histogram_bin_edges(values, BINS)
        lines = {}
        for (source, kept), some in sorted(by_kind.items()):
            counts = np.histogram(some, edges)[0] / len(values)
            lines[f"{source}, {KEPT[kept]}"] = list(zip(edges[:-1].tolist(), counts.tolist(), strict=True))
        charts.append(line_chart(lines, title=name, x_label=name, y_label="share of all texts"))
    return h("div", *charts, class_="charts")


def _gallery(found: Summary, *, kept: bool) -> Html:
    cards = [_card(shown) for shown in found.shown if shown.kept is kept]
    note = "Green texts are kept. Numbers are the scores of a text, in the order of the charts above."
    return join(h("p", note, class_="note"), h("div", *cards, class_="cards")) if cards else h("p", "None.")


def _card(shown: Shown) -> Html:
    lines = []
    for text in shown.texts:
        scores = " ".join("-" if value is None else f"{value:.2f}" for value in text.scores.values())
        said = h("b", text.text, class_="right" if text.kept else None)
        lines.append(h("div", said, " ", h("span", f"{text.source} {scores}", class_="truth")))
    return h("div", picture(thumbnail(shown.image), shown.key), *lines, class_="card")


def _times(found: Summary) -> Html:
    """Return what each start of a stage took; the sum is the price of all, kills included."""
    rows = [
        [
            times["stage"],
            f"{times['images']:,}",
            f"{times['seconds']:.0f} s",
            str(times["workers"]),
            f"{times['images'] / max(times['seconds'], 1e-9):.3g}",
            f"{times['cost']:.2f}",
        ]
        for times in found.times
    ]
    total = sum(times["cost"] for times in found.times)
    head = ["stage", "images", "time", "workers", "images/s", "cost"]
    return table(head, [*rows, ["all", "", "", "", "", f"{total:.2f}"]], "numbers")
