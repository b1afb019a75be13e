"""The parts of the page, each from a run's facts to markup; each says what is missing."""

import re
import time
from datetime import timedelta

from isthmus.cluster.report.charts import COLOURS, Mark, line_chart
from isthmus.cluster.report.folder import Example, RunFacts, Samples, StageFacts
from isthmus.cluster.report.markup import Html, h, join, picture, table
from isthmus.cluster.report.measures import Measure, captioning, retrieval
from isthmus.trainer.monitoring.goodput import Activity

NO_EVALUATION = "There is no evaluation: it is not configured (evaluation.manifest) or has not run yet."
GALLERY = 16


def missing(text: str) -> Html:
    """Say that something is missing."""
    return h("p", text, class_="missing")


def results(facts: RunFacts) -> Html:
    """Return the table of measures with their baselines."""
    measures: list[Measure] = []
    for name, find in (("stage1", retrieval), ("stage2", captioning)):
        if name in facts.stages:
            measures += find(facts.stages[name])
    if not measures:
        return missing(NO_EVALUATION)
    reranked = any(measure.contrast not in (None, measure.value) for measure in measures)
    head = ["measure", "this run", *(["before re-ranking"] if reranked else []), "to compare with"]
    rows = []
    for measure in measures:
        contrast = "" if measure.contrast is None else f"{measure.contrast:.3f}"
        baselines = (h("div", f"{baseline.name}: {baseline.value:.3f}") for baseline in measure.baselines)
        cells = [measure.label, h("b", f"{measure.value:.3f}"), *([contrast] if reranked else []), join(*baselines)]
        rows.append(cells)
    counts = [f"{name}: {len(s.samples.texts)} samples" for name, s in facts.stages.items() if s.samples]
    note = h("p", f"Held-out samples ({', '.join(counts) or 'number unknown'}). ", BASELINES, class_="note")
    return join(table(head, rows, "numbers"), note)


BASELINES = (
    "Chance is a random order. The most frequent caption is given to every image; the caption of another image is what "
    "was generated for the sample before: a model that uses the image is better than both."
)


def curves(facts: RunFacts) -> Html:
    """Return the losses of each stage over its steps, restarts marked."""
    charts = []
    for stage in facts.stages.values():
        restarts = facts.status.restarts if facts.status else []
        marks = [Mark(r.step, f"restart: {r.kind}") for r in restarts if r.stage == stage.name]
        names = stage.names("loss/")
        names = names[:1] if len(names) == 2 else names  # a single part is the total
        lines = {name.removeprefix("loss/"): stage.series(name) for name in names}
        charts.append(line_chart(lines, title=f"{stage.name}: losses", x_label="step", y_label="nats", marks=marks))
        charts += evaluation_charts(stage)
    return h("div", *charts, class_="charts") if charts else missing("No stage has begun.")


def evaluation_charts(stage: StageFacts) -> list[Html]:
    """Return a chart for each kind of figure that was measured more than once."""
    measured = {name: points for name in stage.names("eval/") if len(points := stage.series(name)) > 1}
    kinds: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    for name, points in measured.items():
        short = name.removeprefix("eval/")
        if "loss" in short:
            kind = ("caption loss", "nats a token")
        elif re.search(r"r\d+$", short):
            kind = ("recall", "share found")
        else:
            kind = ("captions", "score")
        kinds.setdefault(kind, {})[short] = points
    return [
        line_chart(dict(list(lines.items())[:COLOURS]), title=f"{stage.name}: {kind}", x_label="step", y_label=unit)
        for (kind, unit), lines in kinds.items()
    ]


def retrieval_examples(facts: RunFacts) -> Html:
    """Return some images with the captions found for them, and captions with the images found."""
    samples = _samples(facts, "stage1")
    if samples is None:
        return missing(NO_EVALUATION)
    with_texts = [_image_to_texts(samples, example) for example in samples.examples if example.texts]
    with_images = [_text_to_images(samples, example) for example in samples.examples if example.images]
    return join(
        h("h3", "An image, and the captions found for it"),
        h("div", *with_texts, class_="cards") if with_texts else missing("No examples were kept."),
        h("h3", "A caption, and the images found for it"),
        h("div", *with_images, class_="cards") if with_images else missing("No examples were kept."),
    )


def _image_to_texts(samples: Samples, example: Example) -> Html:
    truth = samples.texts[example.index].get("caption", "")
    found = [samples.texts[index].get("caption", "") for index in example.texts]
    items = [h("li", text, class_="right" if text == truth else None) for text in found]
    image = _thumbnail(samples, example.index, truth)
    return h("div", image, h("span", truth, class_="truth"), h("ol", *items), class_="card")


def _text_to_images(samples: Samples, example: Example) -> Html:
    truth = samples.texts[example.index].get("caption", "")
    strip = []
    for index in example.images:
        caption = samples.texts[index].get("caption", "")
        strip.append(_thumbnail(samples, index, caption, "right" if caption == truth else None))
    return h("div", h("b", truth), h("div", *strip, class_="strip"), class_="card")


def gallery(facts: RunFacts) -> Html:
    """Return held-out images with true and generated captions."""
    samples = _samples(facts, "stage2")
    if samples is None:
        return missing(NO_EVALUATION if "stage2" in facts.stages else "Stage 2 was not part of this run.")
    cards = []
    for example in samples.examples[:GALLERY]:
        text = samples.texts[example.index]
        truth, generated = text.get("caption", ""), text.get("generated", "")
        right = "right" if generated.strip().lower() == truth.strip().lower() else None
        image = _thumbnail(samples, example.index, truth)
        cards.append(h("div", image, h("b", generated or "(nothing)", class_=right), h("br"),
                       h("span", truth, class_="truth"), class_="card"))  # fmt: skip
    return join(
        h("p", "Bold: generated caption, green if it equals the reference caption below it.", class_="note"),
        h("div", *cards, class_="cards gallery") if cards else missing("No examples were kept."),
    )


def drawings(facts: RunFacts, name: str) -> Html:
    """Return a drawing of each stage's newest evaluation: attention, similarity."""
    found = []
    for stage in facts.stages.values():
        data = stage.samples.pictures.get(f"{name}.png") if stage.samples else None
        if stage.samples and data:
            caption = h("figcaption", f"{stage.name}, step {stage.samples.step}")
            found.append(h("figure", picture(data, f"{name}, {stage.name}"), caption, class_="drawing"))
    return join(*found) if found else missing(NO_EVALUATION)


def goodput(facts: RunFacts) -> Html:
    """Return where the run's time went."""
    if facts.goodput is None:
        return missing("There is no goodput ledger yet.")
    total = sum(facts.goodput.seconds.values()) or 1.0
    parts = [(n, activity, facts.goodput.seconds.get(activity, 0.0)) for n, activity in enumerate(Activity)]
    shares = (
        h("span", title=f"{activity}: {seconds:.1f} s", class_=f"back{n}", style=f"width:{100 * seconds / total:.2f}%")
        for n, activity, seconds in parts
    )
    rows = [
        [join(h("i", class_=f"dot back{n}"), str(activity)), f"{seconds:.1f} s", f"{seconds / total:.1%}"]
        for n, activity, seconds in parts
    ]
    share = facts.goodput.seconds.get(Activity.COMPUTE, 0.0) / total
    starts = "one start" if facts.goodput.starts == 1 else f"{facts.goodput.starts} starts"
    summary = f"{share:.1%} of {duration(total)} was training, over {starts} of the training process."
    return join(h("p", summary), h("div", *shares, class_="bar"), table(["activity", "time", "share"], rows, "numbers"))


def restarts(facts: RunFacts) -> Html:
    """Return the restarts: cause, lost steps, recovery."""
    if facts.status is None:
        return missing("There is no status: the run was not driven by Ray (isthmus train --local).")
    if not facts.status.restarts:
        return h("p", "None.")
    rows = [
        [
            time.strftime("%H:%M:%S", time.gmtime(restart.at)),
            f"{restart.stage}, step {restart.step}",
            restart.cause,
            "not yet known" if restart.lost_steps is None else str(restart.lost_steps),
            "not yet" if restart.recovery_seconds is None else f"{restart.recovery_seconds:.1f} s",
            ", ".join(f"{name} {seconds:g} s" for name, seconds in restart.phases.items()),
        ]
        for restart in facts.status.restarts
    ]
    return table(["UTC", "at", "cause", "steps repeated", "recovered after", "of which"], rows)


def memory(facts: RunFacts) -> Html:
    """Return the largest rank's memory and the sizes of the models."""
    world_size = facts.status.world_size if facts.status else 0
    sizes: list[tuple[str, float]] = []
    for part, size in facts.frozen_bytes.items():
        sizes.append((f"frozen {part} model, its files", size / 1e9))
        if part == "language" and world_size > 1:
            sizes.append((f"its share of one of {world_size} ranks", size / 1e9 / world_size))
    for stage in facts.stages.values():
        if stage.checkpoint:
            sizes.append((f"{stage.name}: a checkpoint", stage.checkpoint.size_bytes / 1e9))
        if peak := max((value for _, value in stage.series("memory/gigabytes")), default=None):
            sizes.append((f"{stage.name}: largest rank, whole process", peak))
    if not sizes:
        return missing("There are no memory figures.")
    largest = max(size for _, size in sizes)
    bars = [
        part
        for name, size in sizes
        for part in (
            h("span", f"{name}: {size:.2f} GB"),
            h("i", class_="back0", style=f"width:{100 * size / largest:.1f}%"),
        )
    ]
    note = "A rank's memory is the GPU's peak, or on CPU the resident memory of the process with its libraries."
    return join(h("div", *bars, class_="size"), h("p", note, class_="note"))


def duration(seconds: float) -> str:
    """Return a duration as hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))


def _samples(facts: RunFacts, stage: str) -> Samples | None:
    known: StageFacts | None = facts.stages.get(stage)
    return known.samples if known else None


def _thumbnail(samples: Samples, index: int, alt: str, class_: str | None = None) -> Html:
    data = samples.thumbnail(index)
    return picture(data, alt, class_) if data else h("span", "(picture not kept)", class_="missing")
